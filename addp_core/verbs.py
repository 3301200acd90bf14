"""The verbs of the command line: each names the module whose `Recipe` it reads and whose `run(recipe)` it calls."""

VERBS = {  # verb: (module, one line of help); modules are imported when their verb is used
    "tokenizer": ("pretrain.tokenizer", "stage 1: train a VQGAN tokenizer on your images"),
    "predictor": ("pretrain.predictor", "stage 2: train a token predictor (MAGE) on its ids"),
    "pretrain": ("pretrain.addp", "stage 3: train ADDP over a frozen tokenizer and predictor"),
    "generate": ("gen.generate", "write generated images and a grid of them"),
    "inpaint": ("gen.inpaint", "fill a hole in a picture, or paint on beyond its sides"),
    "evaluate": ("gen.evaluate", "FID, IS, precision, recall and KID of generated images"),
    "seg train": ("seg.train", "UperNet over the encoder on ADE20K"),
    "seg test": ("seg.test", "mIoU of a trained segmentor, or of class maps on the disk"),
    "seg predict": ("seg.predict", "paint the class maps of pictures beside them"),
    "det train": ("det.train", "train a detector on COCO: ViTDet's Mask R-CNN over an encoder"),
    "det eval": ("det.eval", "average precision of boxes and masks on COCO"),
    "det predict": ("det.predict", "draw boxes, masks and scores on a folder of images"),
    "export": ("tools.export", "write a checkpoint in another layout"),
    "throughput": ("tools.throughput", "measure images/s, GFLOP, MFU and memory, part by part"),
    "toy": ("tools.toy", "write small data sets in the formats of ImageNet, COCO and ADE20K"),
    "doctor": ("tools.doctor", "show what is installed, what each task lacks and how to add it"),
}
