"""Every config key that this project adds to Detectron2's."""

from detectron2.config import CfgNode as CN


def add_mcibi_config(cfg: CN) -> None:
    """Add the keys of MCIBI, with the paper's defaults, to a config of ``get_cfg()``.

    Ordinary things stay on Detectron2's own keys: ``MODEL.SEM_SEG_HEAD.{NAME, IN_FEATURES,
    NUM_CLASSES, CONVS_DIM, NORM, IGNORE_VALUE, LOSS_WEIGHT}``, ``INPUT.*``, ``SOLVER.*``,
    ``DATALOADER.*``, ``TEST.*``.
    """
    # --- The method. Sections and equations are the paper's.
    cfg.MODEL.MCIBI = CN()
    # False is the plain framework: the baseline differs in this key alone.
    cfg.MODEL.MCIBI.ENABLED = True
    # Within-image context A_wi (Eq. 3): none is FCN, ppm PSPNet, aspp DeepLabV3, ocr OCRNet; cc,
    # da, ann, dnl, apc, enc, ema, isa, acf, dm, psa are those that the paper compares with.
    cfg.MODEL.MCIBI.CONTEXT = "none"
    # How the memory is read: pixels, Eq. 12-14; rows, each pixel attends to the rows themselves,
    # which is cheaper; none, it is not read, and trains the classifier by its loss alone.
    cfg.MODEL.MCIBI.AGGREGATION = "pixels"
    # Of AGGREGATION rows: whether H1's class distribution has a say in the attention.
    cfg.MODEL.MCIBI.ROWS_BIAS = True
    # Of AGGREGATION pixels: read the row of the most likely class alone (argmax in Eq. 12).
    cfg.MODEL.MCIBI.HARD_AGGREGATION = False
    # F of Eq. 4: concat | add | weighted_add (Table 1).
    cfg.MODEL.MCIBI.FUSION = "concat"
    # Kernels of the projection to R' and of the concat fusion: 1 or 3.
    cfg.MODEL.MCIBI.PROJECT_KERNEL = 3
    cfg.MODEL.MCIBI.FUSE_KERNEL = 3
    # Channels of query, key and value in Eq. 13-14: C / 2.
    cfg.MODEL.MCIBI.ATTENTION_DIM = 256
    # Of CONTEXT aspp: the three dilations; (): 12, 24, 36, or half of that from stride 16 on.
    cfg.MODEL.MCIBI.ASPP_DILATIONS = ()
    # alpha and beta of Eq. 19.
    cfg.MODEL.MCIBI.LOSS_WEIGHT_W = 0.4
    cfg.MODEL.MCIBI.LOSS_WEIGHT_M = 1.0
    # First iteration with the memory loss; the released code begins after its first epoch.
    cfg.MODEL.MCIBI.LOSS_START_M = 0
    # What H2's batch norm does with the memory rows in the memory loss (representation-consistent
    # learning): running uses its running statistics, which the rows do not change; batch uses those
    # of the rows, which enter the running ones, as released. On CamVid (README.md, three seeds)
    # running reached 57.25 +- 0.53 mIoU, batch 56.56 +- 1.17.
    cfg.MODEL.MCIBI.RCL_BN = "running"

    cfg.MODEL.MCIBI.MEMORY = CN()
    # How the rows start (section 3.2), each before the first iteration but first_batch_mean:
    # random_pixel: one pixel per row, drawn from the training set (the paper).
    # clustering: centres of such pixels by k-means on their directions (Table 2; scikit-learn).
    # first_batch_mean: the mean of a class's pixels in the first batch that has them (released).
    # file: INIT_FILE. Rows that are not found start as with first_batch_mean.
    cfg.MODEL.MCIBI.MEMORY.INIT = "random_pixel"
    # random_pixel and clustering look at each image's labels once at most: until they have all
    # pixels, or have seen this many images. The network runs on images with a drawn pixel alone.
    cfg.MODEL.MCIBI.MEMORY.INIT_MAX_IMAGES = 2000
    # Pixels per class for clustering.
    cfg.MODEL.MCIBI.MEMORY.INIT_PIXELS = 100
    # Of INIT file: .npy, or a .pth with a tensor or a checkpoint, of (K, C), (K * SLOTS, C) or
    # (K, SLOTS, C) numbers. Rows of zeros count as not there.
    cfg.MODEL.MCIBI.MEMORY.INIT_FILE = ""
    # cosine: Eq. 9-10. mean: every pixel alike (Table 2). Three controls tell what the memory does
    # from what the network's further layers do:
    # zero: the rows stay zero, and there is no memory loss.
    # random: random rows, drawn once and frozen; INIT is not used.
    # learned: the rows are parameters, which INIT fills and the optimiser trains, with the head's
    # learning rate and weight decay.
    cfg.MODEL.MCIBI.MEMORY.UPDATE = "cosine"
    # m_0 and p of Eq. 7.
    cfg.MODEL.MCIBI.MEMORY.MOMENTUM = 0.9
    cfg.MODEL.MCIBI.MEMORY.POWER = 0.9
    # poly: Eq. 7. constant: m_0 (Table 2, without "Poly"). lr: m_0 times the current learning rate
    # as a share of its base value, warm-up included (released).
    cfg.MODEL.MCIBI.MEMORY.MOMENTUM_SCHEDULE = "poly"
    # The weight (Eq. 11) of a class that has no row goes to the others. False: it is lost, as
    # released, which tells in COCO-Stuff, where 11 of the 182 classes never occur.
    cfg.MODEL.MCIBI.MEMORY.RENORMALIZE = True
    # Rows per class. With more than one, each has an attention block of its own (released option).
    cfg.MODEL.MCIBI.MEMORY.SLOTS = 1

    # --- Of every backbone.
    # Keep the inputs of its blocks only and compute what is in them again for the backward pass:
    # less memory, more time (mcibi_d2/modeling/README.md says how much of each).
    cfg.MODEL.BACKBONE.CHECKPOINTING = False

    # --- The backbone `build_timm_backbone`.
    cfg.MODEL.TIMM = CN()
    # Any name of timm.list_models() that has features.
    cfg.MODEL.TIMM.NAME = "resnet50c"
    # Stride of the network's last feature: 8, 16 or 32, by dilation. 0: as the network has it, for
    # HRNet and vision transformers.
    cfg.MODEL.TIMM.OUTPUT_STRIDE = 8
    # timm's feature indices. Index i is called res{i+1} in a network of five features, res{i+2} in
    # ConvNeXt, which has four; of a vision transformer's blocks the last one named is res5.
    cfg.MODEL.TIMM.OUT_INDICES = (3, 4)
    # Take timm's weights from its hub. Not looked at when MODEL.WEIGHTS names a file.
    cfg.MODEL.TIMM.PRETRAINED = True
    # BN | SyncBN | FrozenBN. SyncBN is plain BN on one process and on the CPU.
    cfg.MODEL.TIMM.NORM = "SyncBN"
    # 0: train all. 1: freeze the stem. n: the stem and n - 1 stages (blocks of a vision
    # transformer). -1: freeze all. Frozen batch norms stay in evaluation mode.
    cfg.MODEL.TIMM.FREEZE_AT = 0
    # Rate of stochastic depth (timm's drop_path_rate), for networks that have it.
    cfg.MODEL.TIMM.DROP_PATH = 0.0
    # Image size of a vision transformer's position embedding; 0: that of timm's weights, which a
    # timm file in MODEL.WEIGHTS needs. It is resampled for images of other sizes.
    cfg.MODEL.TIMM.IMG_SIZE = 0
    # timm: the network as timm has it. released: HRNet, ResNeSt and vision transformers compute
    # what the released models do (see TimmBackbone); other networks are the same in both.
    cfg.MODEL.TIMM.VARIANT = "timm"
    # Of HRNet: the ReLU after its first convolution. False: without it (released for Cityscapes).
    cfg.MODEL.TIMM.STEM_RELU = True
    # What makes res5 of all features of OUT_INDICES:
    # none: it is the last of them.
    # concat: all, at the size of the first (HRNet).
    # mla: SETR's multi-level aggregation, for four blocks of a vision transformer.
    cfg.MODEL.TIMM.NECK = "none"
    # Of concat: stride of its result, which is that of the first feature (0) or twice as much, by
    # a convolution (released for HRNet on Cityscapes and LIP: 8).
    cfg.MODEL.TIMM.NECK_STRIDE = 0
    # Of mla: channels of each aggregated map; res5 has them for each block.
    cfg.MODEL.TIMM.MLA_CHANNELS = 256

    # --- The head, beside Detectron2's keys.
    # Dropout2d before every classifier.
    cfg.MODEL.SEM_SEG_HEAD.DROPOUT = 0.1
    # Of all layers of the head: relu, or leaky_relu with slope 0.01 (released for ResNets on LIP).
    cfg.MODEL.SEM_SEG_HEAD.ACTIVATION = "relu"
    # Features with an auxiliary FCN head; [] for none. Context modules that work from the stage
    # before the last, or from its prediction (ann, ocr, acf), take the last of these.
    cfg.MODEL.SEM_SEG_HEAD.AUX_FEATURES = ["res4"]
    cfg.MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT = 0.4
    # Convolutions of an auxiliary head before its classifier, and the factor of the up-sampling
    # (nearest) after each of them; released for ViT: 2 and 4.
    cfg.MODEL.SEM_SEG_HEAD.AUX_CONVS = 1
    cfg.MODEL.SEM_SEG_HEAD.AUX_UPSAMPLING = 1
    # Of all predictions over pixels: cross_entropy, over all valid pixels; ohem, over the hard ones
    # alone (online hard example mining, Shrivastava et al., CVPR 2016, as OCNet and HRNet do it for
    # pixels).
    cfg.MODEL.SEM_SEG_HEAD.LOSS = "cross_entropy"
    cfg.MODEL.SEM_SEG_HEAD.OHEM = CN()
    # Pixels are hard whose own class gets a smaller probability ...
    cfg.MODEL.SEM_SEG_HEAD.OHEM.THRESHOLD = 0.7
    # ... and at least so many with the largest losses, of the images of one process.
    cfg.MODEL.SEM_SEG_HEAD.OHEM.MIN_KEPT = 100000
    # One weight per class for the cross-entropies over pixels; empty: all alike.
    cfg.MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS = []

    # --- Training.
    # Learning rate of the head, as a multiple of the backbone's; also of the neck, and of the norms
    # after a vision transformer's blocks, which are as new as the head.
    cfg.SOLVER.HEAD_LR_FACTOR = 1.0
    # SOLVER.LR_SCHEDULER_NAME WarmupPolyLR: (1 - iteration / MAX_ITER) ** POWER, and never below
    # CONSTANT_ENDING, as a share of BASE_LR. Detectron2's DefaultTrainer knows that name if its
    # build_lr_scheduler is overridden with mcibi_d2.engine.build_lr_scheduler (README.md).
    cfg.SOLVER.POLY_LR_POWER = 0.9
    cfg.SOLVER.POLY_LR_CONSTANT_ENDING = 0.0
    # Of the checkpoints of SOLVER.CHECKPOINT_PERIOD and of a stopped run, so many of the newest are
    # kept, beside model_best.pth and model_final.pth; 0: all.
    cfg.SOLVER.CHECKPOINTS_KEPT = 3
    # Of SOLVER.AMP.ENABLED: float16 (with a gradient scaler) or bfloat16.
    cfg.SOLVER.AMP.PRECISION = "float16"

    # --- Data.
    # False: a sample that cannot be read or does not fit stops the training, with its file's name.
    # True: the next good one of the training order takes its place; it is logged, counted over all
    # processes, and reported at the end.
    cfg.DATALOADER.SKIP_BAD = False
    # Seconds to wait for a batch of the workers (DATALOADER.NUM_WORKERS), in training and testing;
    # then the run ends with a sentence. 0: wait for ever.
    cfg.DATALOADER.TIMEOUT = 600

    # --- Augmentation, in this order; INPUT.CROP, INPUT.RANDOM_FLIP are Detectron2's own.
    # Random scale, as a factor of SCALE_BASE; (1.0, 1.0) for none.
    cfg.INPUT.SCALE_RANGE = (0.5, 2.0)
    # (height, width) that the factor scales, turned for images that are higher than wide (released:
    # (512, 2048), LIP (520, 520)); (0, 0): the image's own size.
    cfg.INPUT.SCALE_BASE = (0, 0)
    # Whether an image keeps its ratio and fits into the scaled SCALE_BASE, or takes its size (LIP).
    cfg.INPUT.SCALE_KEEP_RATIO = True
    # No class takes more than this share of a crop, if ten tries find such a crop. 1.0: no limit.
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    # Rotation by at most so many degrees either way (LIP, as released: 30); 0 for none.
    cfg.INPUT.ROTATION_DEGREES = 0
    # The share of samples that are rotated.
    cfg.INPUT.ROTATION_PROB = 0.6
    # Brightness, contrast, saturation and hue.
    cfg.INPUT.COLOR_AUG_SSD = True

    # Size of test images. shortest_edge: MIN_SIZE_TEST and MAX_SIZE_TEST (MIN_SIZE_TEST 0: their
    # own size). fixed: FIXED_SIZE_TEST; MIN_SIZE_TEST should be 0 then, or DefaultPredictor resizes
    # to it before.
    cfg.INPUT.TEST_RESIZE = "shortest_edge"
    # Of TEST_RESIZE fixed: (height, width), whatever the image's ratio (LIP).
    cfg.INPUT.FIXED_SIZE_TEST = (473, 473)

    # The training and test sets, the checkpoint that is loaded, and the memory's INIT_FILE must be
    # for classes of the same names in the same order (checkpoints keep them; case and blanks do not
    # count). True: for as many classes is enough.
    cfg.DATASETS.ALLOW_OTHER_CLASSES = False

    # Of images of 16 bits, the value that becomes 255, such as 4095 where a camera has 12 bits; 0:
    # 65535. `init_dataset` writes it where values are far below.
    cfg.INPUT.WHITE_LEVEL = 0
    # Images of more pixels (height times width) are refused, in training and testing: a small file
    # may hold more than the memory. The default is what Pillow refuses. 0: no limit.
    cfg.INPUT.MAX_PIXELS = 178_956_970

    # --- Your own data set (mcibi_d2/data/own.py): `python -m mcibi_d2.tools.init_dataset` writes
    # these keys. Paths are absolute, begin with ~, or are below DETECTRON2_DATASETS.
    cfg.DATASETS.OWN = CN()
    # Registered as <NAME>_train and <NAME>_val; "" for none.
    cfg.DATASETS.OWN.NAME = ""
    # [folder of images, folder of labels with the same names], [folder of both], or [list or
    # manifest]. A list has an image and its label on each line, a manifest (.json, .yaml, JSON
    # lines) is a list of {image, label}; their paths are relative to the file itself.
    cfg.DATASETS.OWN.TRAIN = []
    # As TRAIN. [] with a VAL_SHARE: that share of TRAIN, chosen by the images' names.
    cfg.DATASETS.OWN.VAL = []
    cfg.DATASETS.OWN.VAL_SHARE = 0.0
    # Of folders: what names of images, and of their labels, end in beside what a pair shares, such
    # as _leftImg8bit and _mask; with the ending (.png) where that alone tells labels from images.
    cfg.DATASETS.OWN.IMAGE_SUFFIX = ""
    cfg.DATASETS.OWN.LABEL_SUFFIX = ""
    # Images that are left out, each as its path below the folder of images or as its list names it.
    cfg.DATASETS.OWN.EXCLUDED = []
    # Name of each class.
    cfg.DATASETS.OWN.CLASS_NAMES = []
    # [red, green, blue] to draw each class with; []: generated.
    cfg.DATASETS.OWN.CLASS_COLORS = []
    # Value of each class in the label files, and the values without ground truth. LABEL_IDS []: 0,
    # 1, 2, ... LABEL_IGNORED []: every pixel has a class.
    cfg.DATASETS.OWN.LABEL_IDS = []
    cfg.DATASETS.OWN.LABEL_IGNORED = [255]
    # Of label files that are colors: [red, green, blue] of each class, and those without ground
    # truth. LABEL_IDS and LABEL_IGNORED are not used then.
    cfg.DATASETS.OWN.LABEL_COLORS = []
    cfg.DATASETS.OWN.IGNORED_COLORS = []
    # Of soft label files (smoothed, resized, once a JPEG): every other value or color is taken as
    # the nearest of those above.
    cfg.DATASETS.OWN.LABEL_NEAREST = False
    # Or, of two classes: values (of colors, their brightness) below it are the class with the lower
    # LABEL_IDS, the others that with the higher. 0: none.
    cfg.DATASETS.OWN.LABEL_THRESHOLD = 0

    # --- Testing, beside Detectron2's keys.
    # whole: the image in one piece. slide: in windows, whose logits are averaged where they meet.
    # Of a large image those of a few rows of windows alone are there at a time.
    cfg.TEST.INFERENCE = "whole"
    # True: where the authors' released code tests in another way, do as it does, for the same
    # numbers. Test images are resized by OpenCV (bilinear between four pixels, whatever they
    # shrink), and scaled further in the same way; windows and augmentations are averaged as
    # probabilities, taken before the resizing; and padding is not cut off but squeezed away.
    cfg.TEST.RELEASED = False
    cfg.TEST.SLIDE = CN()
    # (height, width) of a window, and from one window to the next, in pixels of the network's
    # input (released: 512 and 341, on Cityscapes (1024, 512) and 341).
    cfg.TEST.SLIDE.WINDOW = (512, 512)
    cfg.TEST.SLIDE.STRIDE = (341, 341)
    # flat: all windows on a pixel count alike. gaussian: the less, the farther it is from the
    # window's centre.
    cfg.TEST.SLIDE.WEIGHTS = "flat"
    # Keep and average the windows' logits on the CPU, when they are too many for the GPU.
    cfg.TEST.SLIDE.ACCUMULATE_ON_CPU = False
    # Windows in one forward pass.
    cfg.TEST.SLIDE.BATCH_SIZE = 1
    # Test-time augmentation (TEST.AUG.ENABLED; TEST.AUG.FLIP adds the mirrored image): factors of
    # the test size. TEST.AUG.MIN_SIZES and MAX_SIZE are those of detection and are not read.
    cfg.TEST.AUG.SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    # Whether augmentations are averaged as probabilities or as logits (released on LIP).
    cfg.TEST.AUG.SOFTMAX = True
    # Measure boundary IoU (Cheng et al., CVPR 2021; within 0.02 of the image's diagonal), too.
    cfg.TEST.BOUNDARY_IOU = False
    # After every evaluation, so many images of the first test set go to TensorBoard and to
    # OUTPUT_DIR/overlays.png with their labels and predictions; pictures of the memory, too. 0:
    # no pictures.
    cfg.TEST.VIS_IMAGES = 4
