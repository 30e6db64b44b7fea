#!/usr/bin/env python
"""Train or evaluate a model from a config file: mcibi_d2/tools/train.py.

python train_net.py --config-file configs/ade20k/mcibi_R50.yaml --num-gpus 8
python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
torchrun --nproc-per-node 8 train_net.py --config-file configs/ade20k/mcibi_R50.yaml --resume
"""

from mcibi_d2.tools.command import run_tool
from mcibi_d2.tools.train import main

if __name__ == "__main__":
    run_tool(main)
