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
    # True: the framework with the feature memory. False: the plain framework, the baseline.
    cfg.MODEL.MCIBI.ENABLED = True
    # The module that gathers context within the image (A_wi of Eq. 3), and so the framework: none
    # is FCN, ppm PSPNet, aspp DeepLabV3, ocr OCRNet, cc CCNet, da DANet, ann ANN, dnl DNL, apc
    # APCNet, enc EncNet, ema EMANet, isa OCNet with interlaced attention, acf ACFNet, dm DMNet,
    # psa PSANet.
    cfg.MODEL.MCIBI.CONTEXT = "none"
    # How the pixels read the memory. pixels: each pixel gathers the rows of its likely classes, and
    # attends to what all pixels gathered (Eq. 12-14). rows: each pixel attends to the rows
    # themselves, which is cheaper. none: the memory is not read; its loss still trains the
    # classifier. slots: pixels with an attention block for each slot of MEMORY.SLOTS; pixels is
    # this where there are several slots.
    cfg.MODEL.MCIBI.AGGREGATION = "pixels"
    # With AGGREGATION rows: whether the class probabilities of Eq. 11 are a bias of the attention.
    cfg.MODEL.MCIBI.ROWS_BIAS = True
    # With AGGREGATION pixels: True reads only the row of the most likely class, instead of a sum of
    # rows weighted by probability (argmax in Eq. 12).
    cfg.MODEL.MCIBI.HARD_AGGREGATION = False
    # How features and context are joined, F of Eq. 4: concat, add or weighted_add (Table 1).
    cfg.MODEL.MCIBI.FUSION = "concat"
    # Kernel size, 1 or 3, of the convolution that makes the projected features R'.
    cfg.MODEL.MCIBI.PROJECT_KERNEL = 3
    # Kernel size, 1 or 3, of the convolution of FUSION concat.
    cfg.MODEL.MCIBI.FUSE_KERNEL = 3
    # Channels of query, key and value in the attention of Eq. 13-14 (the paper: half of the
    # channels of R').
    cfg.MODEL.MCIBI.ATTENTION_DIM = 256
    # With CONTEXT aspp: the dilations of its three 3 x 3 convolutions. The empty () means (12, 24,
    # 36), or (6, 12, 18) if the features have stride 16 or more.
    cfg.MODEL.MCIBI.ASPP_DILATIONS = ()
    # Weight of the loss on the class probabilities of Eq. 11, which choose the rows to read (alpha
    # of Eq. 19).
    cfg.MODEL.MCIBI.LOSS_WEIGHT_W = 0.4
    # Weight of the loss that asks the classifier to recognise the memory's rows (beta of Eq. 19).
    cfg.MODEL.MCIBI.LOSS_WEIGHT_M = 1.0
    # The iteration from which on the loss on the memory counts. The released code starts it after
    # the first epoch.
    cfg.MODEL.MCIBI.LOSS_START_M = 0
    # The statistics by which the classifier's batch norm normalises the rows in the loss on the
    # memory (representation-consistent learning). running: its running statistics, which the rows
    # do not change. batch: the statistics of the rows, which then enter the running ones
    # (released). configs/README.md has the results of both on CamVid.
    cfg.MODEL.MCIBI.RCL_BN = "running"

    cfg.MODEL.MCIBI.MEMORY = CN()
    # What the rows are at the start (section 3.2).
    # random_pixel: one pixel per row, drawn from the training set (the paper).
    # clustering: the centres of several such pixels, by k-means on their directions (Table 2; needs
    # scikit-learn).
    # first_batch_mean: the mean of a class's pixels in the first batch that has any (released).
    # file: the rows of INIT_FILE.
    # All but first_batch_mean work before the first iteration; rows for which they find nothing
    # start as with first_batch_mean.
    cfg.MODEL.MCIBI.MEMORY.INIT = "random_pixel"
    # How many images random_pixel and clustering look at for pixels, at most. They stop earlier
    # once every row has its pixels. Each image's labels are read once, and the network runs only on
    # images from which a pixel was drawn.
    cfg.MODEL.MCIBI.MEMORY.INIT_MAX_IMAGES = 2000
    # With INIT clustering: how many pixels of each class are clustered.
    cfg.MODEL.MCIBI.MEMORY.INIT_PIXELS = 100
    # With INIT file: a .npy file, or a .pth file with a tensor or a checkpoint. Shape (K, C),
    # (K * SLOTS, C) or (K, SLOTS, C) for K classes and C channels. Rows of zeros count as missing.
    cfg.MODEL.MCIBI.MEMORY.INIT_FILE = ""
    # How the rows follow the pixels of their class.
    # cosine: pixels unlike their row count more (Eq. 9-10, the paper).
    # mean: every pixel counts the same (Table 2).
    # The other three are controls. They have the same layers as MCIBI, and so show which part of a
    # gain comes from the memory and which from the layers:
    # zero: the rows stay zero, and there is no loss on the memory.
    # random: the rows are drawn at random once and stay; INIT is not used.
    # learned: the rows are parameters. INIT fills them, and the optimiser trains them with the
    # head's learning rate and weight decay.
    cfg.MODEL.MCIBI.MEMORY.UPDATE = "cosine"
    # The momentum at the first iteration (m_0 of Eq. 7): the share of a row that one update
    # replaces.
    cfg.MODEL.MCIBI.MEMORY.MOMENTUM = 0.9
    # The power by which MOMENTUM_SCHEDULE poly falls (p of Eq. 7).
    cfg.MODEL.MCIBI.MEMORY.POWER = 0.9
    # How the momentum changes during the training. poly: it falls to a hundredth of MOMENTUM (Eq.
    # 7). constant: it stays MOMENTUM (Table 2, without "Poly"). lr: it follows the learning rate,
    # warm-up included, in proportion (released).
    cfg.MODEL.MCIBI.MEMORY.MOMENTUM_SCHEDULE = "poly"
    # True: the probability (Eq. 11) of a class that has no row yet is shared out among the others.
    # False: it is lost (released). That matters on COCO-Stuff, where 11 of the 182 classes never
    # occur.
    cfg.MODEL.MCIBI.MEMORY.RENORMALIZE = True
    # Rows per class. With more than one, each has its own attention block (an option of the
    # released code).
    cfg.MODEL.MCIBI.MEMORY.SLOTS = 1

    # --- Of every backbone.
    # Keep the inputs of its blocks only and compute what is in them again for the backward pass:
    # less memory, more time (mcibi_d2/modeling/README.md says how much of each).
    cfg.MODEL.BACKBONE.CHECKPOINTING = False

    # --- The backbone `build_timm_backbone`.
    cfg.MODEL.TIMM = CN()
    # Any network of timm.list_models() that gives features of several stages.
    cfg.MODEL.TIMM.NAME = "resnet50c"
    # Stride of the network's last feature: 8, 16 or 32, reached by dilated convolutions. 0: the
    # network's own stride, for HRNet and vision transformers.
    cfg.MODEL.TIMM.OUTPUT_STRIDE = 8
    # timm's indices of the features to take. Other keys name them res2 to res5: index i is res{i+1}
    # in a network of five features, and res{i+2} in one of four, such as ConvNeXt. In a vision
    # transformer indices are blocks, and the last one listed is res5.
    cfg.MODEL.TIMM.OUT_INDICES = (3, 4)
    # Download timm's pretrained weights. Without effect when MODEL.WEIGHTS names a file.
    cfg.MODEL.TIMM.PRETRAINED = True
    # The backbone's batch norm: BN, SyncBN (over all processes) or FrozenBN (fixed). SyncBN becomes
    # BN on one process and on the CPU.
    cfg.MODEL.TIMM.NORM = "SyncBN"
    # How much of the backbone is frozen. 0: nothing. 1: the stem. n: the stem and the first n - 1
    # stages (blocks in a vision transformer). -1: everything. Frozen batch norms stay in evaluation
    # mode.
    cfg.MODEL.TIMM.FREEZE_AT = 0
    # Rate of stochastic depth (timm's drop_path_rate), in networks that have it.
    cfg.MODEL.TIMM.DROP_PATH = 0.0
    # Image size for which a vision transformer's position embedding is made; it is resampled for
    # images of other sizes. 0: the size of timm's weights, which is needed when MODEL.WEIGHTS is a
    # file of timm's.
    cfg.MODEL.TIMM.IMG_SIZE = 0
    # timm: the network computes what timm's does. released: HRNet, ResNeSt and vision transformers
    # compute what the released models do, which differs a little (TimmBackbone's docstring says
    # how).
    cfg.MODEL.TIMM.VARIANT = "timm"
    # In HRNet: whether a ReLU follows the first convolution. False is as released for Cityscapes.
    cfg.MODEL.TIMM.STEM_RELU = True
    # How the features of OUT_INDICES become the one feature res5. none: the last of them is res5.
    # concat: all are resized to the size of the first, and concatenated (HRNet). mla: SETR's
    # multi-level aggregation, for four blocks of a vision transformer.
    cfg.MODEL.TIMM.NECK = "none"
    # With NECK concat: the stride of its result. 0: the stride of the first feature. Twice that
    # stride: a convolution halves the result (released for HRNet on Cityscapes and LIP: 8).
    cfg.MODEL.TIMM.NECK_STRIDE = 0
    # With NECK mla: channels of each block's map. res5 is these maps concatenated.
    cfg.MODEL.TIMM.MLA_CHANNELS = 256

    # --- The head, beside Detectron2's keys.
    # Probability that a channel is dropped (Dropout2d) before each classifier.
    cfg.MODEL.SEM_SEG_HEAD.DROPOUT = 0.1
    # Activation of all layers of the head: relu, or leaky_relu with slope 0.01 (released for
    # ResNets on LIP).
    cfg.MODEL.SEM_SEG_HEAD.ACTIVATION = "relu"
    # The features that get an auxiliary FCN head; [] for none. The modules that need an earlier
    # stage or its prediction (CONTEXT ann, ocr, acf) use the last one listed.
    cfg.MODEL.SEM_SEG_HEAD.AUX_FEATURES = ["res4"]
    # Weight of the auxiliary heads' losses.
    cfg.MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT = 0.4
    # Convolutions of an auxiliary head before its classifier (released for ViT: 2).
    cfg.MODEL.SEM_SEG_HEAD.AUX_CONVS = 1
    # By how much the features are up-sampled (nearest neighbour) after each of these convolutions
    # (released for ViT: 4).
    cfg.MODEL.SEM_SEG_HEAD.AUX_UPSAMPLING = 1
    # The loss of every per-pixel prediction. cross_entropy: the mean over all labelled pixels.
    # ohem: the mean over the hard ones only (online hard example mining, Shrivastava et al., CVPR
    # 2016, applied to pixels as by OCNet and HRNet).
    cfg.MODEL.SEM_SEG_HEAD.LOSS = "cross_entropy"
    cfg.MODEL.SEM_SEG_HEAD.OHEM = CN()
    # With LOSS ohem: a pixel is hard if the probability of its true class is below this.
    cfg.MODEL.SEM_SEG_HEAD.OHEM.THRESHOLD = 0.7
    # With LOSS ohem: at least this many pixels count as hard in the images of one process, those
    # with the largest losses.
    cfg.MODEL.SEM_SEG_HEAD.OHEM.MIN_KEPT = 100000
    # One weight per class for the losses over pixels. [] weighs all classes the same.
    cfg.MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS = []

    # --- Training.
    # Learning rate of the head as a multiple of the backbone's. It also holds for the neck and for
    # the norms after a vision transformer's blocks, which start untrained like the head.
    cfg.SOLVER.HEAD_LR_FACTOR = 1.0
    # With SOLVER.LR_SCHEDULER_NAME WarmupPolyLR, the learning rate is BASE_LR times
    # (1 - iteration / MAX_ITER) ** POLY_LR_POWER. Detectron2's DefaultTrainer knows
    # it once mcibi_d2.engine is imported.
    cfg.SOLVER.POLY_LR_POWER = 0.9
    # With WarmupPolyLR: the learning rate does not fall below this share of BASE_LR.
    cfg.SOLVER.POLY_LR_CONSTANT_ENDING = 0.0
    # How many of the newest checkpoints are kept, beside model_best.pth and model_final.pth. 0:
    # all.
    cfg.SOLVER.CHECKPOINTS_KEPT = 3
    # With SOLVER.AMP.ENABLED: float16 (with a gradient scaler) or bfloat16.
    cfg.SOLVER.AMP.PRECISION = "float16"

    # --- Data.
    # What happens to a training sample that cannot be read, or whose image and label do not fit.
    # False: the training stops with its file's name. True: the next good sample takes its place,
    # and the bad ones are logged, counted over all processes, and reported at the end.
    cfg.DATALOADER.SKIP_BAD = False
    # Seconds to wait for a batch from the workers (DATALOADER.NUM_WORKERS), in training and
    # testing, before the run ends with an error. 0: wait for ever.
    cfg.DATALOADER.TIMEOUT = 600

    # --- Augmentation, in this order; INPUT.CROP, INPUT.RANDOM_FLIP are Detectron2's own.
    # Each image is scaled by a random factor of this range; (1.0, 1.0) for none.
    cfg.INPUT.SCALE_RANGE = (0.5, 2.0)
    # (height, width) that the random factor multiplies, swapped for images that are higher than
    # wide (released: (512, 2048), on LIP (520, 520)). (0, 0): the image's own size.
    cfg.INPUT.SCALE_BASE = (0, 0)
    # True: an image keeps its aspect ratio and fits into the scaled SCALE_BASE. False: it takes
    # exactly that size (LIP).
    cfg.INPUT.SCALE_KEEP_RATIO = True
    # The largest share of a crop's labelled pixels that one class may have. Ten crops are tried,
    # and if none complies the tenth is taken. 1.0: no limit, and the first crop is taken.
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    # Images are rotated by a random angle of at most this many degrees, either way (released for
    # LIP: 30). 0 for none.
    cfg.INPUT.ROTATION_DEGREES = 0
    # The share of samples that are rotated.
    cfg.INPUT.ROTATION_PROB = 0.6
    # Random brightness, contrast, saturation and hue.
    cfg.INPUT.COLOR_AUG_SSD = True

    # How test images are resized. shortest_edge: the shorter side becomes MIN_SIZE_TEST, unless the
    # longer one would exceed MAX_SIZE_TEST; with MIN_SIZE_TEST 0 images keep their size. fixed: to
    # FIXED_SIZE_TEST; set MIN_SIZE_TEST 0 then, since Detectron2's DefaultPredictor resizes by it
    # first.
    cfg.INPUT.TEST_RESIZE = "shortest_edge"
    # With TEST_RESIZE fixed: (height, width) of every test image, whatever its aspect ratio (LIP).
    cfg.INPUT.FIXED_SIZE_TEST = (473, 473)

    # False: the training and test sets, the loaded checkpoint and the memory's INIT_FILE must have
    # classes of the same names in the same order; case and blanks do not matter. True: the same
    # number of classes is enough.
    cfg.DATASETS.ALLOW_OTHER_CLASSES = False

    # In images of 16 bits, the value that becomes white (255): 4095 for a camera of 12 bits, say. 0
    # means 65535. `init_dataset` sets it where all values are far lower.
    cfg.INPUT.WHITE_LEVEL = 0
    # Images of more pixels (height times width) are refused, in training and testing, because even
    # a small file can decompress to more than the machine's memory. The default is the size that
    # Pillow refuses. 0: no limit.
    cfg.INPUT.MAX_PIXELS = 178_956_970

    # --- Your own data set (mcibi_d2/data/own.py): `python -m mcibi_d2.tools.init_dataset` writes
    # these keys. Paths are absolute, begin with ~, or are below DETECTRON2_DATASETS.
    cfg.DATASETS.OWN = CN()
    # The data set is registered as <NAME>_train and <NAME>_val. "": there is none.
    cfg.DATASETS.OWN.NAME = ""
    # Where the training images and labels are: [folder of images, folder of labels], [folder of
    # both], or [list or manifest]. A list has an image and its label on each line; a manifest
    # (.json, .yaml, JSON lines) is a list of {image, label}. Their paths are relative to the file.
    cfg.DATASETS.OWN.TRAIN = []
    # Where the validation images and labels are, as in TRAIN. []: VAL_SHARE holds some out of
    # TRAIN.
    cfg.DATASETS.OWN.VAL = []
    # With VAL []: the share of TRAIN that is held out for validation, chosen by the images' names.
    cfg.DATASETS.OWN.VAL_SHARE = 0.0
    # In folders, an image and its label share the first part of their names. What follows it in the
    # names of images, such as _leftImg8bit; with the extension (.jpg) if only that tells them
    # apart.
    cfg.DATASETS.OWN.IMAGE_SUFFIX = ""
    # What follows it in the names of labels, such as _mask; with the extension (.png) if only that
    # tells them apart.
    cfg.DATASETS.OWN.LABEL_SUFFIX = ""
    # Images to leave out: paths below the folder of images, or as the list names them.
    cfg.DATASETS.OWN.EXCLUDED = []
    # The names of the classes.
    cfg.DATASETS.OWN.CLASS_NAMES = []
    # The color [red, green, blue] in which each class is drawn. []: colors are generated.
    cfg.DATASETS.OWN.CLASS_COLORS = []
    # The value of each class in the label files. []: 0, 1, 2, ...
    cfg.DATASETS.OWN.LABEL_IDS = []
    # The values in the label files that mean "no ground truth". []: every pixel has a class.
    cfg.DATASETS.OWN.LABEL_IGNORED = [255]
    # In label files whose pixels are colors: the color [red, green, blue] of each class. LABEL_IDS
    # and LABEL_IGNORED are not used then.
    cfg.DATASETS.OWN.LABEL_COLORS = []
    # With LABEL_COLORS: the colors that mean "no ground truth".
    cfg.DATASETS.OWN.IGNORED_COLORS = []
    # For soft label files (smoothed, resized, or once saved as JPEG). True: a value or color that
    # is not listed above is taken as the nearest one that is.
    cfg.DATASETS.OWN.LABEL_NEAREST = False
    # For soft label files of two classes: values below this threshold (brightness, of colors) are
    # the class with the lower value in LABEL_IDS, all others the class with the higher. 0: none.
    cfg.DATASETS.OWN.LABEL_THRESHOLD = 0

    # --- Testing, beside Detectron2's keys.
    # whole: the network sees the image in one piece. slide: it sees windows of the image, whose
    # logits are averaged where they overlap; of a large image, only a few rows of windows and
    # their logits are in memory at a time.
    cfg.TEST.INFERENCE = "whole"
    # True: batch norms become part of the convolutions before them wherever a model is only
    # evaluated (--eval-only, evaluations in training, predictor, demo, export), which is faster.
    # The results are the same up to rounding. Training and checkpoints are not touched.
    cfg.TEST.FOLD_BATCH_NORM = True
    # What the network computes in wherever a model is only evaluated: float32, bfloat16 or float16.
    # Half precision needs half of the memory; bfloat16 is faster on CPUs with AVX-512 BF16 or AMX,
    # both are on GPUs with tensor cores, and float16 is slow on most CPUs. The logits are float32
    # again before they are resized.
    cfg.TEST.PRECISION = "float32"
    # True: test exactly as the authors' released code does, for the same numbers. Test images are
    # resized by OpenCV (bilinear between four pixels, however much they shrink), and so are the
    # scales of TEST.AUG. Windows and augmentations are averaged as probabilities, before the result
    # is resized. Padding is not cut off; the padded result is resized to the image's size.
    cfg.TEST.RELEASED = False
    cfg.TEST.SLIDE = CN()
    # (height, width) of a window, in pixels of the network's input (released for Cityscapes: (1024,
    # 512)).
    cfg.TEST.SLIDE.WINDOW = (512, 512)
    # (height, width) of the step from one window to the next, in the same pixels.
    cfg.TEST.SLIDE.STRIDE = (341, 341)
    # How windows that overlap are weighed. flat: all the same. gaussian: the farther a pixel is
    # from a window's centre, the less that window counts.
    cfg.TEST.SLIDE.WEIGHTS = "flat"
    # Average the windows' logits on the CPU, where they do not fit into the GPU's memory.
    cfg.TEST.SLIDE.ACCUMULATE_ON_CPU = False
    # How many windows go through the network at once.
    cfg.TEST.SLIDE.BATCH_SIZE = 1
    # With TEST.AUG.ENABLED: the factors of the test size at which each image is predicted; with
    # TEST.AUG.FLIP also mirrored. Detectron2's TEST.AUG.MIN_SIZES and MAX_SIZE are for detection,
    # and not read here.
    cfg.TEST.AUG.SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    # True: predictions of all augmentations are averaged as probabilities. False: as logits
    # (released for LIP).
    cfg.TEST.AUG.SOFTMAX = True
    # True: evaluation also measures boundary IoU (Cheng et al., CVPR 2021), of the pixels within 2
    # % of the image's diagonal of a border.
    cfg.TEST.BOUNDARY_IOU = False
    # How many images of the first test set are drawn after every evaluation, with their labels and
    # predictions, in TensorBoard and OUTPUT_DIR/overlays.png. Pictures of the memory come with
    # them. 0: no pictures at all.
    cfg.TEST.VIS_IMAGES = 4
