"""The published files: what each is, who publishes it where, and on which terms.

`diffusionact import` tells this of every file that it reads and of every one that is missing;
training tells it of the networks that its losses ask (`CRITICS`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NO_LICENCE = "none stated: not to be passed on"


@dataclass(frozen=True)
class Origin:
    """One published file.

    option: how `diffusionact import`, or a recipe, takes it; sha256: how its digest begins, where its makers
    put that into its name.
    """

    title: str
    file: str
    url: str
    licence: str
    option: str
    sha256: str = ""

    def told(self) -> str:
        """One line that says what the file is, where it is published and under which licence."""
        return f"{self.title}, {self.file}, from {self.url}; licence: {self.licence}"


ORIGINS: Mapping[str, Origin] = {
    "diffusionact": Origin(
        "DiffusionAct, reenactment encoder and fine-tuned diffusion autoencoder",
        "diffusionact_model.pt",
        "https://github.com/StelaBou/Diffusion-Act (Pretrained Models, DiffusionAct-net)",
        NO_LICENCE,
        "diffusionact_model.pt",
    ),
    "diffae": Origin(
        "DiffAE, the diffusion autoencoder of FFHQ at 256 px",
        "ffhq256_autoenc/last.ckpt",
        "https://github.com/phizaz/diffae (Checkpoints, DiffAE autoencoding only, FFHQ256)",
        "MIT for the code; the faces of FFHQ are CC BY-NC-SA 4.0",
        "--diffae last.ckpt",
    ),
    "s3fd": Origin(
        "S3FD, face detector",
        "s3fd-619a316812.pth",
        "https://www.adrianbulat.com/downloads/python-fan/s3fd-619a316812.pth",
        "BSD-3-Clause (face-alignment)",
        "--s3fd s3fd-619a316812.pth",
        "619a316812",
    ),
    "fan": Origin(
        "2D-FAN-4, landmark detector",
        "2DFAN4-11f355bf06.pth.tar",
        "https://www.adrianbulat.com/downloads/python-fan/2DFAN4-11f355bf06.pth.tar",
        "BSD-3-Clause (face-alignment)",
        "--fan 2DFAN4-11f355bf06.pth.tar",
        "11f355bf06",
    ),
    "emoca": Origin(
        "EMOCA v2, encoder of face shape, expression and pose",
        "EMOCA_v2_lr_mse_20/ with cfg.yaml and detail/checkpoints/*.ckpt",
        "https://emoca.is.tue.mpg.de (model EMOCA_v2_lr_mse_20)",
        "of the Max Planck Society, non-commercial research only",
        "--emoca EMOCA_v2_lr_mse_20",
    ),
    "gaze": Origin(
        "ETH-XGaze, gaze estimator",
        "epoch_24_ckpt.pth.tar",
        "https://github.com/xucong-zhang/ETH-XGaze (pre-trained model)",
        "CC BY-NC-SA 4.0",
        "--gaze epoch_24_ckpt.pth.tar",
    ),
    "flame": Origin(
        "FLAME, morphable face model, and the places of its 68 landmarks",
        "generic_model.pkl and landmark_embedding.npy",
        "https://flame.is.tue.mpg.de (FLAME 2020; the landmarks come with DECA and EMOCA)",
        "of the Max Planck Society, non-commercial research only",
        "--flame generic_model.pkl landmark_embedding.npy",
    ),
    "vgg19": Origin(
        "VGG-19 of ImageNet, whose maps say how alike two pictures look",
        "vgg19-dcbb9e9d.pth",
        "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
        "BSD-3-Clause (torchvision); ImageNet's pictures are for non-commercial research",
        'vgg19 = "vgg19-dcbb9e9d.pth"',
        "dcbb9e9d",
    ),
    "arcface": Origin(
        "ArcFace IR-SE50, face recogniser",
        "model_ir_se50.pth",
        "https://github.com/TreB1eN/InsightFace_Pytorch (IR-SE50)",
        "MIT for the code; the faces of MS1M are for research only",
        'arcface = "model_ir_se50.pth"',
    ),
    "farl": Origin(
        "FaRL ViT-B/16, encoder of faces and their captions",
        "FaRL-Base-Patch16-LAIONFace20M-ep64.pth",
        "https://github.com/FacePerceiver/FaRL (Pre-trained Backbones)",
        "MIT for the code; the faces of LAION-Face are for research only",
        'farl = "FaRL-Base-Patch16-LAIONFace20M-ep64.pth"',
    ),
    "bisenet": Origin(
        "BiSeNet, which part of a face each pixel shows",
        "79999_iter.pth",
        "https://github.com/zllrunning/face-parsing.PyTorch (pre-trained model)",
        "MIT for the code; CelebAMask-HQ is for non-commercial research",
        'bisenet = "79999_iter.pth"',
    ),
}
# Without these there is no picture; the others are of the published tracker, and DiffAE's file is
# wanted only where DiffusionAct's lacks its part.
MODEL = ("diffusionact",)
TRACKER = ("s3fd", "fan", "emoca", "gaze", "flame")
# Only training asks these, and two of the tracker's (`training.critics`).
CRITICS = ("vgg19", "arcface", "farl", "bisenet")
