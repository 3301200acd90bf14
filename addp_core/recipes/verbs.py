"""The verbs of the command line.

Each verb names the module whose `Recipe` it reads and whose `run(recipe)` it calls. A module is imported when its verb
is used.
"""

VERBS = {  # verb: (module, one line of help)
    "tokenizer": ("pretrain.tokenizer", "stage 1: train a VQGAN tokenizer on your images"),
    "predictor": ("pretrain.predictor", "stage 2: train a token predictor (MAGE) on the tokenizer's ids"),
    "pretrain": ("pretrain.addp", "stage 3: train ADDP with a frozen tokenizer and token predictor"),
    "generate": ("gen.generate", "generate images and a grid of them"),
    "inpaint": ("gen.inpaint", "fill a hole in an image, or extend an image beyond its borders"),
    "figures": ("gen.figures", "draw the paper's figures for a checkpoint"),
    "app": ("gen.app", "generate and inpaint on a local web page"),
    "evaluate": ("gen.evaluate", "measure FID, IS, precision, recall and KID of generated images"),
    "finetune": ("cls.finetune", "fine-tune the encoder for image classification"),
    "linprobe": ("cls.linprobe", "train a linear classifier on the frozen encoder, as published or in minutes"),
    "robustness": ("cls.robustness", "measure a fine-tuned classifier on ImageNet-A, -R, -Sketch and -C"),
    "det train": ("det.train", "train ViTDet's Mask R-CNN on COCO"),
    "det eval": ("det.eval", "measure the average precision of boxes and masks on COCO"),
    "det predict": ("det.predict", "draw boxes, masks and scores on a folder of images"),
    "det cost": ("det.cost", "measure time and memory of a detector's training step"),
    "seg train": ("seg.train", "train UperNet on ADE20K"),
    "seg test": ("seg.test", "measure the mIoU of a trained segmentor, or of class maps on disk"),
    "seg predict": ("seg.predict", "draw class maps beside a folder of images"),
    "seg probe": ("seg.probe", "measure mIoU of linear and k-NN probes on the patches of a frozen encoder"),
    "seg cost": ("seg.cost", "measure time and memory of a segmentor's training step and test crop"),
    "bench": ("tools.bench.bench", "run every benchmark on one checkpoint or several, into one table and report"),
    "sweep": ("tools.bench.sweep", "compare initializations with the same small grid and seeds for each"),
    "report": ("tools.bench.report", "write report.html and report.md of a bench folder"),
    "throughput": ("tools.speed.throughput", "measure images/s, GFLOP, MFU and memory, part by part"),
    "data": ("tools.datasets.data", "download, verify and unpack a public dataset"),
    "toy": ("tools.toy.toy", "write small datasets in the formats of ImageNet, COCO and ADE20K"),
    "export": ("tools.export.export", "write a checkpoint in another layout"),
    "doctor": ("tools.doctor", "show what is installed and what tasks lack, or check that this machine computes right"),
}

# Verbs that run as one process, whatever the environment says; `bench` and `sweep` start the processes of others.
ONE_PROCESS = {"app", "det cost", "seg cost", "bench", "sweep", "report", "throughput", "data", "toy", "export", "doctor"}


def verb_groups() -> dict[str, list[str]]:
    """Return the verbs of two words by their first word: {'det': ['det train', ...], ...}."""
    groups: dict[str, list[str]] = {}
    for verb in VERBS:
        if " " in verb:
            groups.setdefault(verb.split()[0], []).append(verb)
    return groups
