"""Published numbers that a report shows beside measured ones, from the tables of the ADDP paper.

model -> benchmark -> metric, as bench.json names them; top-1, AP and mIoU in per cent. What is not here is not known.
"""

SOURCE = "ADDP paper, arXiv 2306.05423 (ICLR 2024)"

Scores = dict[str, dict[str, float]]

PAPER: dict[str, Scores] = {
    "ADDP ViT-B": {
        "generation": {"fid": 8.9, "is": 95.3},
        "finetune": {"top1": 83.9},
        "linprobe": {"top1": 11.5},
        "robustness": {"a": 35.2, "r": 54.4, "sketch": 40.9, "c": 57.3, "average": 47.0},
        "det": {"box_ap": 51.7, "mask_ap": 45.8},
        "seg": {"miou": 48.1},
    },
    "ADDP ViT-L": {
        "generation": {"fid": 7.6, "is": 105.1, "precision": 0.74, "recall": 0.49},
        "finetune": {"top1": 85.9},
        "linprobe": {"top1": 23.8},
        "det": {"box_ap": 54.6, "mask_ap": 48.2},
        "seg": {"miou": 54.3},
    },
    "MAE ViT-B": {
        "finetune": {"top1": 83.6},
        "linprobe": {"top1": 68.0},
        "det": {"box_ap": 51.6, "mask_ap": 45.9},
        "seg": {"miou": 48.1},
    },
    "MAE ViT-L": {
        "finetune": {"top1": 85.9},
        "linprobe": {"top1": 75.8},
        "det": {"box_ap": 55.6, "mask_ap": 49.2},
        "seg": {"miou": 53.6},
    },
    "MAGE ViT-B": {
        "generation": {"fid": 11.0, "is": 95.4},
        "finetune": {"top1": 82.5},
        "linprobe": {"top1": 74.7},
        "det": {"box_ap": 36.3, "mask_ap": 31.3},
        "seg": {"miou": 39.6},
    },
    "MAGE ViT-L": {
        "generation": {"fid": 9.1, "is": 105.1},
        "finetune": {"top1": 83.9},
        "linprobe": {"top1": 78.9},
        "det": {"box_ap": 31.4, "mask_ap": 27.6},
        "seg": {"miou": 43.1},
    },
    "ADDP ResNet-50": {
        "generation": {"fid": 17.1, "is": 40.1},
        "finetune": {"top1": 79.7},  # of 100 epochs; of 300: 80.9
    },
}
COUNTERPARTS = {"ADDP ViT-B": 86e6, "ADDP ViT-L": 304e6}  # with the parameters of the encoder
HEADLINE = tuple(COUNTERPARTS)  # the rows of the first table
