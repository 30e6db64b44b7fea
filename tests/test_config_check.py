"""Every bad value of a config is one sentence, and what is accepted works."""

import ast
import math

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, make_tiny_cfg
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from torch import nn

from mcibi_d2 import InputError, add_mcibi_config
from mcibi_d2.data.augmentation import (
    SemSegInput,
    T,
    build_test_augmentation,
    build_train_augmentation,
)
from mcibi_d2.engine import Trainer, launch, load_config, setup
from mcibi_d2.engine.config_check import check_config, check_values, merge_file, merge_options
from mcibi_d2.engine.config_table import TABLE
from mcibi_d2.engine.schedule import SCHEDULES
from mcibi_d2.evaluation import SemanticSegmentorWithTTA
from mcibi_d2.modeling.norms import NORMS

NAN, INF = math.nan, math.inf
# Wrong types, negative, huge, not finite, empty, nonsense; for many keys some of them are good.
VALUES = (
    None, True, False, 0, -1, 1, 7, 1.5, -0.5, 0.0, 0.5, 2.0, 1e30, -1e30, 10**18, -10**18, NAN,
    INF, -INF, "", "abc", "a\0b", "1", b"x", 1j, ..., {"a": 1}, {1}, (), [], (1,), (7, 9), (9, 7),
    (0, 0), (-1, -1), (0.5, 0.5), (1.5, 1.5), (NAN, NAN), (1e30, 1e30), (10**18,) * 2,
    ("a", "b"), ("",), (True, True), (None,), [None] * 3, (0, 0, 0), (1, 1, 1), (1, 2), (1, 2, 3),
    ("a",) * 3, (NAN,) * 3, (INF,) * 3, (-1.0,) * 3, (1e30,) * 3, [[1]], [[1, 2, 3]], [[-1, 2, 3]],
    [[1, 2]], [(), ()], [0.5] * 16, [0] * 16, [NAN] * 16, ["1"] * 16, [-1] * 16,
)  # fmt: skip


def section(cfg, key):
    """The section of a key, and the key's last part."""
    *path, name = key.split(".")
    for part in path:
        cfg = cfg[part]
    return cfg, name


def complaint(action, *args):
    """The sentence of an :class:`InputError`, None for none; anything else is raised."""
    try:
        action(*args)
    except InputError as error:
        sentence = str(error)
        assert "\n" not in sentence and len(sentence) < 1000
        return sentence
    return None


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    return make_tiny_cfg(
        tmp_path_factory.mktemp("output"), "MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS", str([1.0] * 16),
        "TEST.SLIDE.WINDOW", "(32, 32)", "TEST.SLIDE.STRIDE", "(20, 20)", "INPUT.CROP.SIZE",
        "(33, 49)", "TEST.AUG.SCALES", "(1.0,)", "SOLVER.STEPS", "(2,)", "INPUT.MIN_SIZE_TEST",
        "30",
    )  # fmt: skip


@pytest.mark.parametrize("key", TABLE)
def test_bad_values_are_one_sentence_and_good_ones_work(cfg, key):
    node, name = section(cfg, key)
    before, rule, accepted = node[name], TABLE[key], []
    try:
        for value in VALUES:
            node[name] = value
            sentence = complaint(check_values, cfg)
            if sentence is None:
                accepted.append(value)
            else:
                assert key in sentence and ("expected" in sentence or "needs" in sentence)
            if not rule.accepts(value):
                assert sentence and sentence.startswith(f"{key} is ")
                assert sentence.endswith(f", expected {rule.describe()}")
            # The same value while it is read from a command line, as text and as it is.
            for written in (repr(value), value):
                node[name] = before
                sentence = complaint(merge_options, cfg, [key, written])
                infinite = written == "inf" and rule.accepts(INF)
                if rule.accepts(literal(written)) or infinite:
                    assert sentence is None and rule.accepts(node[name])
                else:
                    assert sentence.startswith(f"command line: {key} is ")
        node[name] = before
        assert complaint(check_values, cfg) is None
        numbers = sorted(x for x in accepted if isinstance(x, int | float) and x is not True)
        for value in (*numbers[:1], *numbers[-1:], *(x for x in accepted if x not in numbers)):
            if repr(value) != repr(before):
                node[name] = value
                complaint(use, cfg, key)
    finally:
        node[name] = before


def literal(written):
    """What a text on the command line stands for."""
    try:
        return ast.literal_eval(written)
    except (ValueError, SyntaxError):
        return written


def use(cfg, key):
    """Build and run, in the smallest way, what reads a key."""
    torch.manual_seed(0)
    part = key.partition(".")[0]
    unread = (
        "RESNETS",
        "FPN",
        "MIN_SIZES",
        "MAX_SIZE",
        "SIGMAS",
        "PRECISE_BN",
        "BOUNDARY",
        "VIS_IMAGES",
    )
    if key in ("MODEL.WEIGHTS", "MODEL.TIMM.PRETRAINED") or any(name in key for name in unread):
        return
    if part == "SOLVER":
        net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
        optimizer = Trainer.build_optimizer(cfg, net)
        scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
        for _ in range(cfg.SOLVER.MAX_ITER):
            net(torch.rand(2, 1, 3, 3)).sum().backward()
            optimizer.step()
            scheduler.step()
    elif part == "INPUT":
        image = np.random.default_rng(0).integers(256, size=(40, 56, 3), dtype=np.uint8)
        for build in (build_train_augmentation, build_test_augmentation):
            inputs = SemSegInput(image, sem_seg=image[..., 0] % 16)
            T.AugmentationList(build(cfg))(inputs)
            assert inputs.image.dtype == np.uint8 and inputs.image.size
    elif part in ("MODEL", "TEST"):
        model = Trainer.build_model(cfg)
        x = {"image": torch.randint(256, (3, 40, 56), dtype=torch.uint8), "height": 50, "width": 70}
        if part == "MODEL":
            labels = torch.arange(40 * 56).view(40, 56) % cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
            losses = model.train()([{**x, "sem_seg": labels}] * 2)
            assert all(loss.isfinite() for loss in losses.values())
            sum(losses.values()).backward()
        with torch.no_grad():
            if key.startswith("TEST.AUG"):
                model = SemanticSegmentorWithTTA(cfg, model)
            (result,) = model.eval()([x])
        assert next(iter(result.values())).shape[-2:] == (50, 70)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_of_the_head_trains(cfg, norm):
    head = cfg.MODEL.SEM_SEG_HEAD
    before = head.NORM, head.CONVS_DIM, cfg.MODEL.MCIBI.ATTENTION_DIM
    head.NORM, head.CONVS_DIM, cfg.MODEL.MCIBI.ATTENTION_DIM = norm, 32, 32  # GN has 32 groups
    try:
        use(cfg, "MODEL.SEM_SEG_HEAD.NORM")
    finally:
        head.NORM, head.CONVS_DIM, cfg.MODEL.MCIBI.ATTENTION_DIM = before


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_of_the_table_can_be_built(cfg, name):
    before, cfg.SOLVER.LR_SCHEDULER_NAME = cfg.SOLVER.LR_SCHEDULER_NAME, name
    try:
        check_values(cfg)
        use(cfg, "SOLVER.LR_SCHEDULER_NAME")
    finally:
        cfg.SOLVER.LR_SCHEDULER_NAME = before


@pytest.mark.parametrize("kind", ["null", ".nan", "[null]", "{a: 1}", "2026-01-01", "!!set {a}"])
def test_values_of_files_name_file_and_key(tmp_path, kind):
    path = tmp_path / "wrong.yaml"
    for key in TABLE:
        text = kind
        for part in reversed(key.split(".")):
            text = f"{{{part}: {text}}}"
        path.write_text(text)
        sentence = complaint(merge_file, base(), str(path))
        if sentence is None:  # of keys that may be None
            assert TABLE[key].accepts(yaml.safe_load(kind))
        else:
            assert sentence.startswith(f"{path}: {key} is ")


_base = None


def base():
    """A config of defaults, into which nothing was merged."""
    global _base
    if _base is None:
        _base = get_cfg()
        add_mcibi_config(_base)
    return _base


@pytest.mark.parametrize(
    "text, message",
    [
        ("SOLVER: 5", r"SOLVER is 5, expected keys with their values"),
        ("MODEL: {MCIBI: null}", r"MODEL\.MCIBI is None, expected keys"),
        ("- a", r"expected|cannot be read"),
        ("", r"expected|cannot be read"),
        ("a: [", "cannot be read as a config"),
        ("1: 2", "'1' is no config key"),
        ("null: 2", "'None' is no config key"),
        ("_BASE_: wrong.yaml", "_BASE_ leads back to the file itself"),
        ("_BASE_: 5", "cannot be read as a config"),
        ("SOLVER: {BASE_LR: 1e-3, BASE_LR: [}", "cannot be read as a config"),
        ("MODEL: {WEIGHT: x.pth}", r"MODEL\.WEIGHT is no config key any more, expected MODEL\.WEI"),
        ("VERSION: 1", "VERSION is 1, expected one of 2"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"^{path}: .*{message}"):
        load_config(str(path))


@pytest.mark.parametrize(
    "options, message",
    [
        (["SOLVER", "5"], r"SOLVER is 5, expected a key below it, such as SOLVER\.\w+"),
        (["MODEL.MCIBI", "None"], r"MODEL\.MCIBI is None, expected a key below it"),
        (["MODEL.MCIBI", "{'ENABLED': 1}"], r"MODEL\.MCIBI is .*expected a key below it"),
        (["SOLVER.MAX_ITER.X", "5"], r"'SOLVER\.MAX_ITER\.X' is no config key; did you mean"),
        (["SOLVER.MAX_ITR", "5"], r"did you mean SOLVER\.MAX_ITER\?"),
        (["SOLVER.MAX_ITER=5"], "expected a key and its value: SOLVER.MAX_ITER 5"),
        (["SOLVER.MAX_ITER", "5", "SEED"], "SEED has no value, expected KEY VALUE pairs"),
        (["SOLVER.MAX_ITER"], r"SOLVER\.MAX_ITER has no value"),
        (["", "5"], "'' is no config key"),
        (["_BASE_", "x.yaml"], "'_BASE_' is no config key"),
        (["SOLVER.MAX_ITER", "9" * 5000], r"SOLVER\.MAX_ITER is .*expected a whole number"),
        (["SOLVER.MAX_ITER", "(" * 500 + ")" * 500], "expected a whole number"),
        (["SOLVER.MAX_ITER", "{[]: 1}"], "expected a whole number"),
        (["MODEL.RPN.NMS_THRESH", "None"], r"MODEL\.RPN\.NMS_THRESH is None, expected a number"),
        (["MODEL.KEYPOINT_ON", "3"], r"MODEL\.KEYPOINT_ON is 3, expected True or False"),
        (["TEST.EXPECTED_RESULTS", "[[1, 2, 3, 4]]"], "each .task, metric, value, tolerance"),
        (["MODEL.DEVICE", "meta"], r"MODEL\.DEVICE is 'meta', expected cuda, cpu or another"),
        (["OUTPUT_DIR", "s3://bucket/run"], r"OUTPUT_DIR is 's3://bucket/run', expected a folder"),
        (["MODEL.PIXEL_STD", "(1, 1, 1e-30)"], r"MODEL\.PIXEL_STD is \(1, 1, 1e-30\), expected"),
        (["INPUT.SCALE_RANGE", "(1e-9, 1)"], r"INPUT\.SCALE_RANGE is \(1e-09, 1\), expected \(sm"),
    ],
)  # fmt: skip
def test_options_that_are_no_config(options, message):
    with pytest.raises(InputError, match=f"^command line: .*{message}"):
        load_config("", options)


def test_whole_numbers_are_numbers():
    cfg = load_config("", ["SOLVER.BASE_LR", "1", "INPUT.ROTATION_DEGREES", "22.5",
                           "SOLVER.CLIP_GRADIENTS.NORM_TYPE", "inf"])  # fmt: skip
    assert type(cfg.SOLVER.BASE_LR) is float and cfg.INPUT.ROTATION_DEGREES == 22.5
    assert cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE == INF


@pytest.mark.parametrize(
    "options, message",
    [
        (("SOLVER.NESTEROV", True, "SOLVER.MOMENTUM", 0.0), "SOLVER.MOMENTUM is 0, expected more"),
        (("SOLVER.STEPS", (3, 2)), "SOLVER.STEPS is .*, expected rising iterations"),
        (("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", (4,)),
         "SOLVER.STEPS is .*before SOLVER.MAX_ITER 4"),
        (("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR", 0.0),
         "SOLVER.BASE_LR is 0.0, expected more than 0"),
        (("MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS", [0.0] * 16), "expected one above 0"),
        (("MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS", [1.0] * 3), "3 values, expected one for each"),
        (("MODEL.TIMM.OUT_INDICES", (4, 3)), "OUT_INDICES is .4, 3., expected rising"),
        (("MODEL.SEM_SEG_HEAD.AUX_FEATURES", ["res4", "res4"]), "AUX_FEATURES .*each name once"),
        (("MODEL.TIMM.NAME", "resnet5O"), "NAME is 'resnet5O', .*expected .*close: resnet50"),
        (("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.RES5_DILATION", 4),
         "RES5_DILATION is 4, expected 1 or 2 for Detectron2's ResNet-50"),
        (("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 18),
         "RES2_OUT_CHANNELS is 256, expected 64"),
        (("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
         r"FPN.IN_FEATURES is \[\], expected some of MODEL.RESNETS.OUT_FEATURES \['res4'\]"),
        (("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
          "MODEL.FPN.IN_FEATURES", ["res4"]), "OUT_FEATURES is .'res4'., expected res5 in it for"),
        (("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"), "finds objects, expected MCIBISegmentor"),
        (("INPUT.CROP.TYPE", "relative"), "CROP.TYPE is 'relative', expected one of absolute"),
        (("INPUT.CROP.SIZE", (65535, 65535)), "CROP.SIZE is .*, expected at most 178956970 pixels"),
        (("INPUT.FIXED_SIZE_TEST", (60000, 3000)), "FIXED_SIZE_TEST is .* at most 178956970 pix"),
        (("MODEL.SEM_SEG_HEAD.NORM", "GN"), "NORM is GN, which cannot norm 16 channels"),
        (("MODEL.MCIBI.CONTEXT", "foo"), "CONTEXT is 'foo', expected one of none, ppm"),
        (("MODEL.MCIBI.MEMORY.INIT", "foo"), "INIT is 'foo', expected one of random_pixel"),
        (("SOLVER.MAX_ITER", None), "SOLVER.MAX_ITER is None, expected a whole number"),
    ],
)  # fmt: skip
def test_a_trainer_that_is_built_by_hand_says_the_same(tiny_cfg, options, message):
    tiny_cfg.merge_from_list(list(options))
    with pytest.raises(InputError, match=message):
        Trainer(tiny_cfg)
    tiny_cfg.freeze()
    if options[0].startswith("MODEL"):
        with pytest.raises(InputError, match=message):
            Trainer.build_model(tiny_cfg)


def test_configs_without_the_keys_say_so(tiny_cfg):
    del tiny_cfg.MODEL["MCIBI"]
    with pytest.raises(InputError, match=r"MODEL\.MCIBI\.ENABLED is not in the config"):
        Trainer(tiny_cfg)
    tiny_cfg.MODEL["MCIBI"] = 5
    with pytest.raises(InputError, match=r"MODEL\.MCIBI is 5, expected a section"):
        Trainer(tiny_cfg)


RECORD = {"file_name": "scenes://train/0.png", "sem_seg_file_name": "scenes://train/0_labels.png"}
NO_LABELS = [{"file_name": "x.png"}, {"file_name": "y.png"}]


@pytest.fixture
def odd_data_set(tiny_cfg):
    """Gives what registers a data set of such records and metadata, and a config that names it."""

    def register(records, key, **metadata):
        DatasetCatalog.register("test_odd", lambda: records)
        names = MetadataCatalog.get("scenes_train").stuff_classes
        metadata = {"stuff_classes": names, "ignore_label": 255, **metadata}
        MetadataCatalog.get("test_odd").set(**metadata)
        tiny_cfg.DATASETS[key] = ("test_odd",)
        return tiny_cfg

    yield register
    DatasetCatalog.remove("test_odd")
    MetadataCatalog.remove("test_odd")


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
@pytest.mark.parametrize(
    "records, metadata, message",
    [
        ([], {}, "data set test_odd is empty, expected one image or more"),
        ([{"image": "x.png"}], {}, "data set test_odd has no file_name for 1 of 1 images, such as"),
        ([RECORD], {"evaluator_type": ("sem_seg",)},
         r"evaluator_type .* of data set test_odd is \('sem_seg',\), expected a text"),
        ([RECORD], {"stuff_classes": "road"}, "stuff_classes .* is 'road', expected a list"),
        ([RECORD], {"stuff_classes": [1] * 16}, "stuff_classes .* of data set test_odd is "),
        ([RECORD], {"ignore_label": "void"}, "ignore_label .* test_odd is 'void', expected a"),
        ([RECORD], {"stuff_classes": ["a", "b"]}, "NUM_CLASSES is 16, but test_odd has 2 classes"),
        (None, {}, "data set test_odd, which another project registered, cannot be loaded"),
    ],
)  # fmt: skip
def test_odd_data_sets_are_said(odd_data_set, key, records, metadata, message):
    cfg = odd_data_set(records, key, **metadata)
    with pytest.raises(InputError, match=message):
        check_config(cfg)
    with pytest.raises(InputError, match=message):
        if key == "TRAIN" or metadata:
            Trainer(cfg)
        else:
            Trainer.test(cfg, nn.Identity())


def test_results_are_expected_of_a_data_set(tiny_cfg):
    tiny_cfg.TEST.EXPECTED_RESULTS = [["sem_seg", "mIoU", 40.0, 1.5]]
    with pytest.raises(InputError, match=r"EXPECTED_RESULTS is .*'mIoU'.*but DATASETS\.TEST is"):
        check_config(tiny_cfg)


def test_training_set_without_labels_is_said(odd_data_set):
    cfg = odd_data_set([RECORD, *NO_LABELS], "TRAIN")
    for start in (check_config, Trainer, Trainer.build_train_loader):
        with pytest.raises(InputError, match=r"has no sem_seg_file_name for 2 of 3 .*x\.png"):
            start(cfg)
    cfg.DATASETS.TRAIN = ()
    for start in (check_config, Trainer, Trainer.build_train_loader):
        with pytest.raises(InputError, match=r"DATASETS\.TRAIN is \(\), expected the name"):
            start(cfg)
    cfg.DATASETS.TRAIN = ("scene_train",)
    for start in (check_config, Trainer, Trainer.build_train_loader):
        with pytest.raises(InputError, match="'scene_train' is not a registered .*scenes_train"):
            start(cfg)


@pytest.mark.parametrize(
    "options, message",
    [
        (["SOLVER.MAX_ITER", "None"], "command line: SOLVER.MAX_ITER is None, expected"),
        (["DATASETS.TRAIN", "('scene_train',)"], "'scene_train' is not a registered data set"),
        (["MODEL.MCIBI.CONTEXT", "foo"], "CONTEXT is 'foo', expected one of none, ppm"),
        (["MODEL.TIMM.OUT_INDICES", "(0, 1)"], "IN_FEATURES has 'res5', expected a feature of"),
    ],
)
def test_the_command_line_says_one_sentence(tmp_path, options, message, capsys):
    options = [*options, "MODEL.TIMM.PRETRAINED", "False", "OUTPUT_DIR", str(tmp_path)]
    args = default_argument_parser().parse_args(
        ["--config-file", str(ROOT / "configs/scenes/mcibi_tiny.yaml"), *options]
    )
    with pytest.raises(SystemExit) as end:
        launch(lambda args, cfg: Trainer(cfg), setup, args)
    said = capsys.readouterr().err + f"{end.value.code}"
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in said
