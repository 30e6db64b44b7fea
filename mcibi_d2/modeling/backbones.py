"""timm's networks, and Detectron2's dilated ResNet, as backbones."""

import contextlib
import difflib
import re
import urllib.error
import urllib.request
from collections.abc import Iterator

import timm
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.utils import comm
from huggingface_hub import constants as hub
from timm.layers import (
    AvgPool2dSame,
    convert_sync_batchnorm,
    freeze_batch_norm_2d,
    resample_abs_pos_embed,
)
from timm.models.hrnet import HighResolutionModule
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import InputError
from .blocks import resolve_norm
from .necks import NECKS, ConcatNeck, MLANeck
from .norms import norm_factory

NORMS = ("BN", "SyncBN", "FrozenBN")
VARIANTS = ("timm", "released")
# How long timm's hub may take to answer that it is there.
_HUB_SECONDS = 5
# Where timm's names of parameters tell their stage, with its number: layer1, stages.0, blocks.0.
_STAGE = re.compile(r"(?:layers?|stages?|blocks?|transition|s)[._]?(\d+)(?:\.|$)")


class TimmBackbone(Backbone):
    """A timm network that gives features, with an optional neck.

    Features are named as in Detectron2, where ``res2`` has stride 4 and ``res5`` is the last:

    - In a network of five features (ResNet, ResNeSt, HRNet, MobileNet), timm's index i is
      ``res{i+1}``. With ``output_stride`` 8 the last three have stride 8, by dilation.
    - In one of n features (ConvNeXt has four, from stride 4 on), index i is ``res{i+6-n}``.
    - In a vision transformer an index is a block. All have one stride, the patch size, and the
      names count back from the end of ``out_indices``: (5, 11, 17, 23) are ``res2`` .. ``res5``.
      Each has a LayerNorm of its own, since timm's blocks have none after them.
    - With a neck, ``res5`` is what the neck gives, and the others are the maps that go into the
      concatenation: as they are (``concat``), or aggregated (``mla``, where the last one is
      ``res5_map``).

    HRNet's features are its branches, without the layers that widen them for classification.

    With ``variant="released"`` three kinds of network compute what the models do that the paper's
    authors released, and OpenMMLab's, whose parameters are the same; others are not changed:

    - HRNet up-samples its branches bilinearly (timm: nearest), to the size of the branch that they
      are added to, so that images may have any size. ``stem_relu=False`` leaves out the ReLU after
      its first convolution, as their model of Cityscapes.
    - ResNeSt has no pooling in the shortcut of a dilated stage (timm: 2 x 2, of stride 1).
    - A vision transformer's position embedding is resampled bilinearly (timm: bicubic and
      antialiased).

    Ask for no feature that nobody uses: if layers get no gradient, training on several processes
    stops.

    Args:
        name: of a timm model, e.g. ``resnet50c``, ``hrnet_w48``, ``vit_large_patch16_384``.
        output_stride: of the network's last feature: 8, 16 or 32 by dilation; 0 leaves it as it
            is. HRNet and vision transformers take 0, or the value that they have anyway.
        out_indices: timm's indices of the features, rising.
        pretrained: take timm's weights, from its hub or its cache.
        norm: ``BN``, ``SyncBN`` or ``FrozenBN``, in place of the network's batch norms.
        freeze_at: of the network, not of the neck: 0 trains all, 1 freezes the stem, n the stem
            and n - 1 stages (in a vision transformer: blocks), -1 all. What is frozen has no
            gradient and stays in evaluation mode.
        drop_path: timm's ``drop_path_rate``, 0 <= rate < 1.
        img_size: in pixels, for the position embedding of a vision transformer; 0 is that of the
            pretrained weights. Either is resampled for each image that has another size.
        variant: ``timm`` or ``released``, see above.
        stem_relu: see above; False is for HRNet alone.
        neck: ``none``, ``concat`` (:class:`ConcatNeck`) or ``mla`` (:class:`MLANeck`).
        neck_stride: of ``concat``: 0 is that of the finest feature, else twice that.
        mla_channels: of each aggregated map of ``mla``.
        neck_norm: name for ``detectron2.layers.get_norm``, for the neck.
    """

    @configurable
    def __init__(
        self,
        name: str,
        *,
        output_stride: int = 8,
        out_indices: tuple[int, ...] = (3, 4),
        pretrained: bool = False,
        norm: str = "BN",
        freeze_at: int = 0,
        drop_path: float = 0.0,
        img_size: int = 0,
        variant: str = "timm",
        stem_relu: bool = True,
        neck: str = "none",
        neck_stride: int = 0,
        mla_channels: int = 256,
        neck_norm: str = "BN",
    ):
        super().__init__()
        for key, value, allowed in (
            ("NORM", norm, NORMS),
            ("NECK", neck, NECKS),
            ("VARIANT", variant, VARIANTS),
        ):
            if value not in allowed:
                choices = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
                raise InputError(f"MODEL.TIMM.{key} is {value!r}, expected {choices}")
        check_name(name)
        self.name = name
        out_indices = tuple(out_indices)
        net = _create(name, output_stride, out_indices, pretrained, drop_path, img_size)
        if not stem_relu:
            if not name.startswith("hrnet"):
                raise InputError(
                    f"MODEL.TIMM.STEM_RELU is False, which is for HRNet, not for {name}"
                )
            net.act1 = nn.Identity()
        if variant == "released":
            _compute_as_released(net)
        info = net.feature_info
        strides = [feature["reduction"] for feature in info.info]
        plain = len(strides) > 1 and len(set(strides)) == 1  # a vision transformer
        if plain and img_size % strides[0]:
            raise InputError(
                f"MODEL.TIMM.IMG_SIZE is {img_size}, expected a multiple of {name}'s patch "
                f"size, {strides[0]}"
            )
        self._indices = None
        if _is_wrapped(net):
            # Without the wrapper the parameters have timm's own names, as in its files.
            self._indices = out_indices
            net = net.model
        if norm == "SyncBN":
            net = convert_sync_batchnorm(net)
        elif norm == "FrozenBN":
            net = freeze_batch_norm_2d(net)
        self.net = net
        self._frozen = self._freeze(freeze_at)

        self._names = [f"res{index + 6 - len(strides)}" for index in out_indices]
        if plain:
            if len(out_indices) > 4:
                raise InputError(
                    f"MODEL.TIMM.OUT_INDICES is {out_indices}, expected at most 4 blocks of {name}"
                )
            self._names = [f"res{6 - n}" for n in range(len(out_indices), 0, -1)]
        channels = info.channels()
        self.norms = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in channels if plain)
        self.neck = self._make_neck(
            neck, neck_stride, channels, info.reduction(), plain, mla_channels, neck_norm
        )
        self._shapes = self._find_shapes(max(strides), output_stride, channels)
        self._divisibility = 0 if self._takes_any_size() else max(strides)

    def _make_neck(
        self,
        neck: str,
        neck_stride: int,
        channels: list[int],
        strides: list[int],
        plain: bool,
        mla_channels: int,
        norm: str,
    ) -> nn.Module | None:
        """The neck for features of these channels and strides."""
        make_norm = norm_factory(norm)
        if neck != "concat" and neck_stride:
            raise InputError(
                f"MODEL.TIMM.NECK_STRIDE is {neck_stride}, expected 0: only the neck concat has it"
            )
        if neck == "none":
            return None
        if self._names[-1] != "res5":
            raise InputError(
                f"MODEL.TIMM.NECK is {neck}, which makes res5, but MODEL.TIMM.OUT_INDICES of "
                f"{self.name} ends with {self._names[-1]}"
            )
        if neck == "concat":
            if neck_stride not in (0, strides[0], 2 * strides[0]):
                raise InputError(
                    f"MODEL.TIMM.NECK_STRIDE is {neck_stride}, expected {strides[0]} or "
                    f"{2 * strides[0]} with these features of {self.name}"
                )
            return ConcatNeck(channels, neck_stride == 2 * strides[0], make_norm)
        if not plain or strides[-1] % MLANeck.UPSAMPLING:
            raise InputError(
                f"MODEL.TIMM.NECK is mla, expected a vision transformer with patches of a "
                f"multiple of {MLANeck.UPSAMPLING} pixels, not {self.name}"
            )
        return MLANeck(channels, mla_channels, make_norm)

    def _freeze(self, freeze_at: int) -> list[nn.Module]:
        """Take the gradient of the first stages; returns their modules."""
        found = {}
        for name, _ in self.net.named_parameters():
            match = _STAGE.match(name)
            found[name] = int(match[1]) if match else None
        numbers = sorted({number for number in found.values() if number is not None})
        if freeze_at > 1 and not numbers:
            raise InputError(
                f"MODEL.TIMM.FREEZE_AT is {freeze_at}, but the stages of {self.name} are not "
                f"known, expected 0 (none), 1 (the stem) or -1 (all)"
            )
        if not -1 <= freeze_at <= len(numbers) + 1:
            raise InputError(
                f"MODEL.TIMM.FREEZE_AT is {freeze_at}, expected -1 (all) to {len(numbers) + 1} "
                f"with {self.name}, which has a stem and {len(numbers)} stages"
            )
        if freeze_at == 0:
            return []
        if freeze_at == -1:
            self.net.requires_grad_(False)
            return list(self.net.modules())
        frozen = {None, *numbers[: freeze_at - 1]}
        for name, parameter in self.net.named_parameters():
            if found[name] in frozen:
                parameter.requires_grad_(False)
        modules = []
        for name, module in self.net.named_modules():
            inside = [found[p] for p in found if not name or p.startswith(f"{name}.")]
            match = _STAGE.match(name)
            stage = int(match[1]) if match else None
            # Not a container of stages that are trained.
            if stage in frozen and all(number in frozen for number in inside):
                modules.append(module)
        return modules

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Set the mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.training = False
        return self

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec | None = None) -> dict:
        """Arguments of ``__init__`` from a config with :func:`mcibi_d2.add_mcibi_config`."""
        options = cfg.MODEL.TIMM
        return {
            "name": options.NAME,
            "output_stride": options.OUTPUT_STRIDE,
            "out_indices": options.OUT_INDICES,
            # A file to load makes the download pointless.
            "pretrained": options.PRETRAINED and not cfg.MODEL.WEIGHTS,
            "norm": resolve_norm(options.NORM, cfg.MODEL.DEVICE),
            "freeze_at": options.FREEZE_AT,
            "drop_path": options.DROP_PATH,
            "img_size": options.IMG_SIZE,
            "variant": options.VARIANT,
            "stem_relu": options.STEM_RELU,
            "neck": options.NECK,
            "neck_stride": options.NECK_STRIDE,
            "mla_channels": options.MLA_CHANNELS,
            # The neck is as new as the head.
            "neck_norm": resolve_norm(cfg.MODEL.SEM_SEG_HEAD.NORM, cfg.MODEL.DEVICE),
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (N, 3, H, W) to features by name, each (N, C, ~H/stride, ~W/stride).

        H and W are multiples of :attr:`size_divisibility`, if that is not 0.
        """
        if self._indices is None:
            maps = self.net(images)
        else:
            maps = self.net.forward_intermediates(
                images, indices=list(self._indices), intermediates_only=True
            )
        if self.norms:
            maps = [
                norm(map_.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
                for map_, norm in zip(maps, self.norms, strict=True)
            ]
        if self.neck is None:
            return dict(zip(self._names, maps, strict=True))
        maps, joined = self.neck(maps)
        names = [*self._names[:-1], "res5_map"]
        # The neck concat gives no map for the last name.
        return {**dict(zip(names, maps, strict=False)), "res5": joined}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature."""
        return dict(self._shapes)

    @property
    def size_divisibility(self) -> int:
        """What height and width of images must be a multiple of; 0: they may have any size.

        The patch size for vision transformers; 32 for HRNet, whose branches are added to each
        other; the stride of the last stage for ConvNeXt, which cuts off what is left over.
        """
        return self._divisibility

    @torch.no_grad()
    def _probe(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """The features of an image of (height, width), without data: shapes only."""
        tensors = {
            name: torch.empty_like(tensor, device="meta")
            for name, tensor in (*self.named_parameters(), *self.named_buffers())
        }
        self.eval()
        try:
            return functional_call(self, tensors, torch.empty(1, 3, *size, device="meta"))
        finally:
            self.train()

    def _find_shapes(
        self, unit: int, output_stride: int, channels: list[int]
    ) -> dict[str, ShapeSpec]:
        """Channels and strides as they are, not as they are said to be.

        Args:
            unit: a size of images that every stage can divide.
            output_stride: that was asked for.
            channels: of the network's features, by timm's word.
        """
        height, width = 6 * unit, 8 * unit
        try:
            features = self._probe((height, width))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise InputError(
                f"MODEL.TIMM.NAME is {self.name}, which cannot work on images of any size, such "
                f"as {height}x{width}: {error}"
            ) from error
        shapes = {
            name: ShapeSpec(channels=feature.shape[1], stride=height // feature.shape[2])
            for name, feature in features.items()
        }
        if self.neck is None:
            if [shape.channels for shape in shapes.values()] != list(channels):
                raise InputError(
                    f"MODEL.TIMM.NAME is {self.name}, whose features are not (N, C, H, W)"
                )
            last = max(shape.stride for shape in shapes.values())
            if output_stride and last > output_stride:
                raise InputError(
                    f"MODEL.TIMM.OUTPUT_STRIDE is {output_stride}, but {self.name} has stride "
                    f"{last}"
                )
        return shapes

    def _takes_any_size(self) -> bool:
        """Whether the features cover any image to its last pixel, with sizes rounded up."""
        height, width = 101, 135
        try:
            features = self._probe((height, width))
        except (RuntimeError, AssertionError, ValueError):
            return False
        return all(
            tuple(features[name].shape[2:]) == (-(-height // s.stride), -(-width // s.stride))
            for name, s in self._shapes.items()
        )


def check_name(name: str) -> None:
    """Raise an :class:`InputError` with similar names for a network that timm does not know."""
    if not timm.is_model(name):
        # timm knows over a thousand: those that are closest, however far that is.
        close = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0)
        raise InputError(
            f"MODEL.TIMM.NAME is {name!r}, which timm {timm.__version__} does not know, expected "
            f"one of timm.list_models(); close: {', '.join(close)}"
        )


def _create(
    name: str,
    output_stride: int,
    out_indices: tuple[int, ...],
    pretrained: bool,
    drop_path: float,
    img_size: int,
) -> nn.Module:
    """Build the timm network; of several processes on a machine, one downloads."""
    whole = all(isinstance(index, int) and index >= 0 for index in out_indices)
    if not out_indices or not whole or list(out_indices) != sorted(set(out_indices)):
        raise InputError(
            f"MODEL.TIMM.OUT_INDICES is {out_indices}, expected rising indices from 0 on"
        )
    if not 0 <= drop_path < 1:
        raise InputError(f"MODEL.TIMM.DROP_PATH is {drop_path}, expected 0 <= rate < 1")
    asked = f"features {out_indices} at output stride {output_stride}"
    keys = "MODEL.TIMM.OUT_INDICES, MODEL.TIMM.OUTPUT_STRIDE"
    options = {"features_only": True, "out_indices": out_indices}
    if name.startswith("hrnet"):
        options["feature_location"] = ""  # the branches
    for option, value, words, key in (
        ("output_stride", output_stride, "", ""),
        ("drop_path_rate", drop_path, f", with drop path {drop_path}", "DROP_PATH"),
        ("img_size", img_size, f", for images of {img_size} pixels", "IMG_SIZE"),
    ):
        if value:
            options[option] = value
            asked += words
            keys += f", MODEL.TIMM.{key}" if key else ""
    try:
        options = _complete(name, options)
    except Exception as error:
        reason = str(error) or "it is not made for that; OUTPUT_STRIDE 0 leaves the network's own"
        if isinstance(error, IndexError):
            reason = "it has fewer features"
        raise InputError(f"timm's {name} cannot give {asked} ({keys}): {reason}") from error

    first = comm.get_local_rank() == 0
    if pretrained and not first:
        comm.synchronize()
    try:
        with _cache_alone_when_offline() if pretrained else contextlib.nullcontext():
            net = timm.create_model(name, pretrained=pretrained, **options)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise InputError(
            f"timm could not get the weights of {name} ({type(error).__name__}); put a state dict "
            f"at MODEL.WEIGHTS, or set MODEL.TIMM.PRETRAINED False to start from scratch"
        ) from error
    if pretrained and first:
        comm.synchronize()
    return net


@contextlib.contextmanager
def _cache_alone_when_offline() -> Iterator[None]:
    """Where the hub cannot be reached, take what was downloaded before, or fail, at once.

    The hub's own library tries again for about a minute before it fails.
    """
    try:
        request = urllib.request.Request(hub.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=_HUB_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # which is an answer
    except (OSError, ValueError):
        before, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True
        try:
            yield
        finally:
            hub.HF_HUB_OFFLINE = before
        return
    yield


def _complete(name: str, options: dict) -> dict:
    """The arguments of ``timm.create_model`` that this network needs, found by trying.

    Nothing is downloaded and no memory is taken: the network is built without data.
    """

    def attempt(**more) -> nn.Module:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **options, **more)

    stride = options.pop("output_stride", 0)
    try:
        net = attempt(**({"output_stride": stride} if stride else {}))
        if stride:
            options["output_stride"] = stride
    except (TypeError, AssertionError):
        # No choice of a stride; it may be the one that was asked for.
        net = attempt()
        if max(feature["reduction"] for feature in net.feature_info.info) != stride:
            raise
    flat = any(re.search(r"_\d+$", child) for child, _ in net.named_children())
    if flat and _is_wrapped(attempt(feature_cls="getter")):
        # Else the parameters would have other names than in timm's files: stages_0 for stages.0.
        options["feature_cls"] = "getter"
    if _is_wrapped(net) and hasattr(net.model, "dynamic_img_size"):
        options["dynamic_img_size"] = True
    return options


def _is_wrapped(net: nn.Module) -> bool:
    """Whether timm has put the whole network, as its files know it, into a wrapper."""
    return hasattr(getattr(net, "model", None), "forward_intermediates")


class _BilinearBranches(HighResolutionModule):
    """HRNet's module with branches up-sampled bilinearly, to any size. Same parameters."""

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """Branches to branches, as timm's."""
        x = [branch(map_) for branch, map_ in zip(self.branches, x, strict=True)]
        joined = []
        for i, layers in enumerate(self.fuse_layers):
            size, total = x[i].shape[-2:], 0
            for layer, map_ in zip(layers, x, strict=True):
                map_ = layer(map_)
                if map_.shape[-2:] != size:  # twice a size that was rounded up
                    map_ = F.interpolate(map_, size, mode="bilinear", align_corners=False)
                total = total + map_
            joined.append(self.fuse_act(total))
        return joined


class _BilinearPositions(VisionTransformer):
    """A vision transformer whose position embedding is resampled bilinearly. Same parameters."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        positions = resample_abs_pos_embed(
            self.pos_embed,
            new_size=x.shape[1:3],
            old_size=self.patch_embed.grid_size,
            num_prefix_tokens=self.num_prefix_tokens,
            interpolation="bilinear",
            antialias=False,
        )
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], dim=1)
        return self.pos_drop(x + positions)


def _compute_as_released(net: nn.Module) -> None:
    """Change in place what :class:`TimmBackbone` says of the variant ``released``."""
    for module in net.modules():
        if type(module) is HighResolutionModule and module.num_branches > 1:
            module.__class__ = _BilinearBranches
            for layer in module.fuse_layers.modules():
                if isinstance(layer, nn.Upsample):
                    layer.mode, layer.align_corners = "bilinear", False
        elif type(module) is VisionTransformer:
            plain = module.num_prefix_tokens == 1 and not module.no_embed_class
            if plain and module.pos_embed is not None:
                module.__class__ = _BilinearPositions
        shortcut = getattr(module, "downsample", None)
        if isinstance(shortcut, nn.Sequential) and isinstance(shortcut[0], AvgPool2dSame):
            shortcut[0] = nn.Identity()


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg, input_shape: ShapeSpec | None = None) -> nn.Module:
    """Build the backbone that ``MODEL.TIMM`` describes."""
    backbone = TimmBackbone(cfg, input_shape)
    head = cfg.MODEL.SEM_SEG_HEAD
    unused = backbone.output_shape().keys() - {*head.IN_FEATURES, *head.get("AUX_FEATURES", ())}
    if backbone.norms and unused and cfg.MODEL.TIMM.NECK == "none":
        raise InputError(
            f"MODEL.TIMM.OUT_INDICES {tuple(cfg.MODEL.TIMM.OUT_INDICES)} gives "
            f"{', '.join(sorted(unused))}, which is in neither MODEL.SEM_SEG_HEAD.IN_FEATURES nor "
            f"AUX_FEATURES: the norm of that block would never be trained"
        )
    return backbone


@BACKBONE_REGISTRY.register()
def build_dilated_resnet_backbone(cfg, input_shape: ShapeSpec) -> nn.Module:
    """Build the dilated ResNet of Detectron2's DeepLab project, from Detectron2's own keys.

    ``MODEL.RESNETS.RES5_DILATION`` 1, 2 or 4 gives output stride 32, 16 or 8. The stem is that of
    three 3x3 convolutions, and there is no multi-grid, as in the paper; where a config has the
    project's own keys ``STEM_TYPE`` and ``RES5_MULTI_GRID``, these hold.
    """
    try:
        from detectron2.projects.deeplab import build_resnet_deeplab_backbone
    except ImportError as error:
        raise InputError(
            "MODEL.BACKBONE.NAME is build_dilated_resnet_backbone, which needs Detectron2's "
            "project DeepLab (detectron2.projects.deeplab), and this Detectron2 has none; "
            "build_timm_backbone with resnet50c is the same network"
        ) from error
    cfg = cfg.clone()
    cfg.defrost()
    resnets = cfg.MODEL.RESNETS
    dilation = resnets.RES5_DILATION
    if dilation not in (1, 2, 4):
        raise InputError(f"MODEL.RESNETS.RES5_DILATION is {dilation}, expected 1, 2 or 4")
    if resnets.DEPTH not in (50, 101, 152):
        raise InputError(f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}, expected 50, 101 or 152")
    resnets.RES4_DILATION = 2 if dilation == 4 else 1
    resnets.setdefault("STEM_TYPE", "deeplab")
    resnets.setdefault("RES5_MULTI_GRID", [1, 1, 1])
    resnets.NORM = resolve_norm(resnets.NORM, cfg.MODEL.DEVICE)
    return build_resnet_deeplab_backbone(cfg, input_shape)
