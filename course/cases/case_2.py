"""Exercise 2: where the picture's patches go (see check.py)."""

import functools

import numpy as np
import torch

import model
from action_tokenizer import load_tokenizer
from machinery.config import load_config

OWNER, NAME = model.VLA, "embed"


@functools.cache
def tiny(*settings: str) -> model.VLA:
    """The demo's model, but with one block in each part."""
    towers = load_config("configs/demo.yaml").vision_backbone
    cfg = load_config("configs/demo.yaml", ["action_dim=4", *settings])
    cfg = cfg.model_copy(update={
        "vision_backbone": {name: {**tower, "depth": 2} for name, tower in towers.items()},
        "llm_backbone": {**cfg.llm_backbone, "num_hidden_layers": 1}})
    torch.manual_seed(0)
    return model.VLA(cfg, load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)).eval()


def inputs(vla: model.VLA, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pictures, and the ids 1, 2, 3, ... as text."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (batch, vla.num_images, 84, 84, 3), np.uint8)
    return torch.from_numpy(images), torch.arange(1, 8).repeat(batch, 1)


@torch.no_grad()
def one_picture():
    vla = tiny()
    return vla.embed(*inputs(vla)).numpy()


@torch.no_grad()
def two_pictures():
    vla = tiny("window_size=2")
    return vla.embed(*inputs(vla)).numpy()


@torch.no_grad()
def with_state():
    vla = tiny("use_proprio=true", "proprio_dim=3")
    return vla.embed(*inputs(vla), torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])).numpy()


def probes() -> list:
    return [("one picture", "一张图像", one_picture), ("two pictures", "两张图像", two_pictures),
            ("a picture and the robot's state", "图像和机器人状态", with_state)]


TOGETHER = "torch.cat([text[:, :1], extra, text[:, 1:]], dim=1)"
MISTAKES = [
    (TOGETHER, "torch.cat([extra, text], dim=1)",
     "the patches come before <s>: <s> must stay first, and the patches follow it",
     "图像块跑到 <s> 前面去了：<s> 必须在最前面，图像块紧跟其后"),
    (TOGETHER, "torch.cat([text, extra], dim=1)",
     "the patches come after the text: the action would be predicted before the picture is seen",
     "图像块放在了文本后面：模型还没看到图像就要预测动作了"),
    (TOGETHER, "torch.cat([text[:, :1], extra, text], dim=1)",
     "<s> is there twice: the text after the patches begins with its second token",
     "<s> 出现了两次：图像块后面的文本应该从第二个词元开始"),
    (TOGETHER, "torch.cat([text[:, :1], extra, text[:, 2:]], dim=1)",
     "the token after <s> is lost: the text continues at index 1",
     "<s> 后面的那个词元丢了：文本应该从下标 1 接着放"),
    (TOGETHER, "torch.cat([extra, text[:, 1:]], dim=1)",
     "<s> is lost: it must be the first token of the sequence",
     "<s> 丢了：它必须是序列的第一个词元"),
    ("if proprio is not None:", "if False:",
     "the robot's state is not used: if there is one, it is one more token after the patches",
     "没有用机器人的状态：如果给了状态，它是图像块之后的又一个词元"),
    ("[extra, state[:, None]]", "[state[:, None], extra]",
     "the state comes before the patches: it belongs after them",
     "状态放在了图像块前面：它应该在后面"),
    (TOGETHER, "torch.cat([text[:, :1], extra[:, :-1], text[:, 1:], extra[:, -1:]], dim=1)",
     "the state comes after the text: it belongs after the patches, before the words",
     "状态放在了文本后面：它应该在图像块之后、文字之前"),
    (".flatten(1, 2)", ".transpose(1, 2).flatten(1, 2)",
     "the patches of two pictures are mixed: all of the first picture come first",
     "两张图像的图像块混在一起了：应该先放第一张的全部图像块"),
    (".flatten(1, 2)", "[:, 0]",
     "only the first picture is used: a sample may have several",
     "只用了第一张图像：一个样本可以有多张"),
]
