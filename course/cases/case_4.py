"""Exercise 4: the loss of a training step (see check.py)."""

import functools

import numpy as np
import torch

import model
from action_tokenizer import load_tokenizer
from course.cases.case_2 import tiny
from data import Mixture, collate, open_tables
from machinery.config import load_config

OWNER, NAME = model.VLA, "forward"


@functools.cache
def batch() -> dict:
    """Eight frames of the demo, whose instructions differ in length."""
    cfg = load_config("configs/demo.yaml", ["action_dim=4"])
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)
    mixture = Mixture(cfg, open_tables(cfg), tokenizer)
    dataset, rows, _ = mixture.draw(0, 8)
    return collate([mixture.sample(*one) for one in zip(dataset, rows, strict=True)], tokenizer.pad_token_id)


@torch.no_grad()
def result(which: int):
    """The loss (0), the predicted ids (1), or the true ones (2)."""
    found = tiny()(batch()["images"], batch()["input_ids"], batch()["labels"])
    return np.asarray(found[which])


def gradient():
    """The loss's gradient at the last layer before the language model."""
    vla = tiny()
    loss = vla(batch()["images"], batch()["input_ids"], batch()["labels"])[0]
    return torch.autograd.grad(loss, vla.projector["projector"][4].bias)[0].numpy()


def probes() -> list:
    return [("the true ids", "真实的 id", lambda: result(2)), ("the predicted ids", "预测的 id", lambda: result(1)),
            ("the loss", "损失", lambda: result(0)), ("the gradient", "梯度", gradient)]


def all_positions(shift: int) -> float:
    """The loss over every position's next token (`shift` 1), whether it is an action or not."""
    vla, ids = tiny(), batch()["input_ids"]
    with torch.no_grad():
        inputs = vla.embed(batch()["images"], ids)
        logits = vla.llm(inputs_embeds=inputs).logits[:, -ids.shape[1]:].float()
    return float(torch.nn.functional.cross_entropy(logits[:, :-shift].flatten(0, 1), ids[:, shift:].flatten()))


def mask_forgotten(got: dict) -> bool:
    return bool(np.isclose(got["the loss"], all_positions(1), rtol=1e-3))


def too_many(got: dict) -> bool:
    return got["the predicted ids"].shape == (8, 5) or got["the true ids"].shape == (8, 5)


MISTAKES = [
    (mask_forgotten, "the mask is forgotten: the loss covers the prompt and the padding too; only labels other than -100 count",
     "忘了掩码：损失把提示词和填充也算进去了；只有不是 -100 的标签才算"),
    (too_many, "</s> is among the returned ids: it counts in the loss, but it is no number of the action ([:, :-1])",
     "返回的 id 里混进了 </s>：它算进损失，但不是动作里的数 ([:, :-1])"),
    ("at_positions(hidden, wanted - 1)", "at_positions(hidden, wanted)",
     "labels shifted by one: position i predicts the token at i + 1, so a1 is predicted at the prompt's last token",
     "标签错开了一位：位置 i 预测的是 i + 1 处的词元，所以 a1 由提示词的最后一个词元预测"),
    ("at_positions(hidden, wanted - 1)", "at_positions(hidden, wanted - 2)",
     "labels shifted by one too many: a1 is predicted at the prompt's last token, not before it",
     "标签多错了一位：a1 由提示词的最后一个词元预测，不是再前一个"),
    ("wanted = wanted + inputs.shape[1] - labels.shape[1]", "wanted = wanted + 0",
     "the patches are forgotten: the sequence is longer than the text, so positions behind them are larger",
     "忘了图像块：序列比文本长，图像块之后的位置要加上它们的个数"),
    ("logits.flatten(0, 1)", "logits.softmax(-1).flatten(0, 1)",
     "softmax twice: cross_entropy wants the logits and computes the softmax itself",
     "做了两次 softmax：cross_entropy 要的是 logits，softmax 由它自己来算"),
    ("return loss,", "return loss.detach(),",
     "the loss has no gradient, so backward() could change nothing: return it without detach() or no_grad()",
     "损失没有梯度，backward() 什么也改不了：不要用 detach() 或 no_grad()"),
    ("return loss,", "return loss.item(),",
     "the loss is a plain number without a gradient: return the tensor, without item()",
     "损失成了没有梯度的普通数：请返回张量，不要用 item()"),
    ("F.cross_entropy(logits.flatten(0, 1), targets.flatten())",
     "F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, :-1].flatten())",
     "</s> is not in the loss: OpenVLA's loss covers the action and </s>",
     "损失里没有 </s>：OpenVLA 的损失包括动作和 </s>"),
    ("F.cross_entropy(logits.flatten(0, 1), targets.flatten())",
     "F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction='sum')",
     "the loss is a sum: it must be the mean over all labels, or the learning rate would mean something else",
     "损失成了总和：应该是对所有标签取平均，否则学习率的含义就变了"),
]
