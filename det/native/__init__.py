"""ViTDet in detectron2's own way: the encoder as a registered backbone, LazyConfigs and a training program."""
