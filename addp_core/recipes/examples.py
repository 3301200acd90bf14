"""The two most useful command lines of each verb, which `addp <verb>` shows when its arguments are missing."""

EXAMPLES = {
    "tokenizer": (
        "addp tokenizer tiny data=photos out=runs/tokenizer",
        "addp tokenizer vqgan_256 data=imagenet out=runs/vqgan loss.perceptual_weights=vgg16.pth",
    ),
    "tokenizer cache": (
        "addp tokenizer cache model=runs/tokenizer data=photos data.size=64 crops=8 out=runs/tokens",
        "addp tokenizer cache model=vqgan.ckpt data=imagenet out=runs/tokens",
    ),
    "predictor": (
        "addp predictor tiny data=photos tokenizer=runs/tokenizer out=runs/predictor",
        "addp predictor mage_vit_b_1600ep data=imagenet tokenizer=vqgan.ckpt out=runs/mage",
    ),
    "pretrain": (
        "addp pretrain tiny data=photos out=runs/tiny",
        "addp pretrain vit_b_1600ep data=imagenet tokenizer=vqgan.ckpt predictor=mage.pth out=runs/vit_b",
    ),
    "mae": (
        "addp mae tiny data=photos out=runs/mae",
        "addp mae vit_b_1600ep data=imagenet out=runs/mae_b",
    ),
    "generate": (
        "addp generate model=zoo:cifar10 out=runs/first n=64",
        "addp generate model=runs/vit_b out=runs/vit_b/generated n=64",
    ),
    "inpaint": (
        "addp inpaint model=runs/tiny image=cat.jpg size=64 box=[20,20,120,120] out=filled n=4",
        "addp inpaint model=runs/tiny image=cat.jpg size=64 extend=[16,0,16,0] out=wider",
    ),
    "figures": (
        "addp figures model=runs/tiny data=photos out=runs/tiny/figures",
        "addp figures model=mae_pretrain_vit_base.pth data=photos out=runs/mae/figures",
    ),
    "app": ("addp app model=runs/tiny", "addp app model=zoo:cifar10 port=7860"),
    "evaluate": (
        "addp evaluate model=runs/vit_b reference=imagenet out=runs/vit_b/evaluation n=50000",
        "addp evaluate model=runs/tiny reference=photos out=runs/tiny/own extractor=runs/ft",
    ),
    "finetune": (
        "addp finetune tiny model=runs/tiny data=labeled out=runs/ft",
        "addp finetune vit_b_100ep model=runs/vit_b data=imagenet out=runs/ft_b",
    ),
    "linprobe": (
        "addp linprobe fast model=runs/vit_b data=imagenet out=runs/probe_fast",
        "addp linprobe vit_b_90ep model=runs/vit_b data=imagenet out=runs/probe",
    ),
    "robustness": (
        "addp robustness model=runs/ft_b out=runs/robustness imagenet_a=imagenet-a imagenet_r=imagenet-r",
        "addp robustness model=runs/ft_b out=runs/robustness imagenet_c=imagenet-c val=imagenet",
    ),
    "det train": (
        "addp det train tiny model=runs/tiny data=coco out=runs/det",
        "addp det train vitdet_b_100ep model=runs/vit_b data=coco out=runs/det_b",
    ),
    "det eval": ("addp det eval model=runs/det data=coco", "addp det eval model=runs/det data=coco per_class=true"),
    "det predict": (
        "addp det predict model=runs/det images=photos out=runs/det/drawn",
        "addp det predict model=runs/det images=photos out=runs/det/drawn score=0.1 most=20",
    ),
    "det cost": ("addp det cost model=base batch=1", "addp det cost model=runs/vit_b engine=detectron2"),
    "seg train": (
        "addp seg train tiny model=runs/tiny data=ADEChallengeData2016 out=runs/seg",
        "addp seg train vit_b_80k model=runs/vit_b data=ADEChallengeData2016 out=runs/seg_b",
    ),
    "seg test": (
        "addp seg test model=runs/seg data=ADEChallengeData2016 out=runs/seg/test",
        "addp seg test model=runs/seg data=ADEChallengeData2016 out=runs/seg/tta test.flip=true",
    ),
    "seg predict": (
        "addp seg predict model=runs/seg images=photos out=runs/seg/painted",
        "addp seg predict model=runs/seg images=cat.jpg out=runs/seg/painted paint=0.4",
    ),
    "seg probe": (
        "addp seg probe tiny model=runs/tiny data=ADEChallengeData2016 out=runs/probe_tiny",
        "addp seg probe ade20k model=runs/vit_b data=ADEChallengeData2016 out=runs/probe_ade",
    ),
    "seg cost": ("addp seg cost steps=2", "addp seg cost model=base crop=512 batch=4"),
    "bench": (
        "addp bench demo",
        "addp bench vit_b model=runs/vit_b out=runs/bench data.imagenet=imagenet data.coco=coco bench.processes=8",
    ),
    "sweep": ("addp sweep cifar10", "addp sweep my_sweep.yaml out=runs/sweep"),
    "report": ("addp report out=runs/bench", "addp report out=runs/bench price_per_hour=2.5"),
    "throughput": ("addp throughput", "addp throughput train=false sample=false data=photos"),
    "data": ("addp data imagenette out=datasets", "addp data coco out=datasets"),
    "toy": ("addp toy out=runs/toy", "addp toy out=runs/toy only=[imagenet] imagenet_train=4000"),
    "export": (
        "addp export model=runs/ft_b out=ft_b layout=timm",
        "addp export model=runs/vit_b out=encoder.safetensors layout=encoder",
    ),
    "completion": ('eval "$(addp completion bash)"', "addp completion fish > ~/.config/fish/completions/addp.fish"),
    "doctor": ("addp doctor", "addp doctor check=true"),
}
