"""Draw the diagrams of README and tour as SVG: python docs/draw.py

The SVG is written line by line, without a library. The project's own code computes the numbers in it.
"""

import sys
from html import escape
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from action_tokenizer import ActionTokenizer, normalize, unnormalize  # noqa: E402

INK, GRAY, LIGHT = "#222222", "#777777", "#f0f0f0"
BLUE, GREEN, ORANGE, RED = "#cfe2f7", "#d5ecd2", "#ffe0b5", "#f6cfcf"
WORDS = {
    "en": {"image": "256 patches", "prompt": "In: What action should the robot ...? Out:",
           "input": "input", "predicted": "prediction", "label": "label", "none": "no label",
           "loss": "The model predicts a token at every position; the loss compares 8 of them with labels",
           "one": "One number of an action, to its token and back", "robot": "the robot moved",
           "norm": "normalized", "bin": "bin of 256", "id": "token id", "center": "bin center",
           "back": "sent to the robot",
           "lost": "rounding error: {:.3f} mm (half a bin: {:.3f} mm)",
           "file": "file", "table": "frame table", "sample": "sample", "batch": "batch k", "rank": "rank r",
           "stage": "ZeRO-{}", "weight": "weight", "gradient": "gradient", "copy": "float32 copy",
           "moments": "two moments", "each": "GPU {}: {} bytes", "zero": "Bytes per trained parameter on "
           "each of 4 GPUs (N GPUs divide by N)"},
    "zh": {"image": "256 个图像块", "prompt": "In: What action should the robot ...? Out:",
           "input": "输入", "predicted": "预测", "label": "标签", "none": "无标签",
           "loss": "模型在每个位置都预测下一个词元, 损失只比较其中 8 个",
           "one": "动作中的一个数: 编码与还原", "robot": "机器人移动了", "norm": "归一化",
           "bin": "256 个区间之一", "id": "词元 id", "center": "区间中心", "back": "发给机器人",
           "lost": "舍入误差: {:.3f} mm (半个区间: {:.3f} mm)",
           "file": "文件", "table": "帧表", "sample": "样本", "batch": "第 k 批", "rank": "第 r 个进程",
           "stage": "ZeRO-{}", "weight": "权重", "gradient": "梯度", "copy": "float32 副本",
           "moments": "一阶矩和二阶矩", "each": "GPU {}: {} 字节",
           "zero": "每个可训练参数在 4 块 GPU 上各占的字节数; N 块 GPU 时除以 N"},
}
CHAIN = {  # the boxes of the data diagram
    "en": {"file": ["an episode is a record", "of a TFRecord shard;", "images stay JPEG"],
           "table": ["built once, one row per", "frame: its file, JPEG", "offset, and action"],
           "sample": ["one read, decode, resize;", "prompt ids, then 7 action", "ids and </s>"],
           "batch": ["256 samples, a function", "of (seed, k): no shuffle", "buffer, no state to save"],
           "rank": ["its part of batch k, in", "micro-batches; gradients", "are accumulated"]},
    "zh": {"file": ["一个回合是 TFRecord", "分片里的一条记录;", "图像保持 JPEG"],
           "table": ["只建一次索引, 每帧一行:", "在哪个文件, JPEG 从", "哪里开始, 动作是什么"],
           "sample": ["读一次, 解码, 缩放;", "提示词 id, 然后 7 个", "动作 id 和 </s>"],
           "batch": ["256 个样本, 只由 (seed, k)", "决定: 不需打乱缓冲区,", "也无状态要保存"],
           "rank": ["取第 k 批中自己的一份,", "分成小批, 梯度累加", ""]},
}
PLACES = {"file": "rlds.py", "table": "frames.py", "sample": "data.py, Mixture.sample",
          "batch": "data.py, Mixture.draw", "rank": "data.py, TrainBatches"}


class Picture:
    """Boxes, text, and arrows on white."""

    def __init__(self, width: int, height: int):
        self.size, self.parts = (width, height), []

    def box(self, x, y, width, height, fill, edge=INK):
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" '
                          f'fill="{fill}" stroke="{edge}"/>')

    def text(self, x, y, words, size=15, anchor="middle", fill=INK, bold=False):
        weight = ' font-weight="bold"' * bold
        self.parts.append(f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
                          f'fill="{fill}"{weight}>{escape(str(words))}</text>')

    def arrow(self, x1, y1, x2, y2, color=INK):
        self.parts.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{color}" '
                          'stroke-width="1.5" marker-end="url(#tip)"/>')

    def save(self, name: str):
        width, height = self.size
        tip = ('<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
               f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>')
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                f'height="{height}" font-family="Helvetica, Arial, \'Noto Sans CJK SC\', sans-serif">')
        body = [head, tip, f'<rect width="{width}" height="{height}" fill="white"/>', *self.parts, "</svg>\n"]
        (FOLDER / name).write_text("\n".join(body))


def follow(meters: float, low: float, high: float) -> tuple[float, int, int, float, float]:
    """A move in meters -> normalized, bin, token id, bin center, meters again, with the project's code."""
    stats = {"q01": [low], "q99": [high], "min": [low - 1], "max": [high + 1]}
    tokenizer = ActionTokenizer(32000)  # Llama-2's vocabulary
    normalized = normalize(np.float32([meters]), stats, "bounds_q99")
    token = tokenizer.encode(normalized)
    center = tokenizer.decode(token)
    back = unnormalize(center, stats, "bounds_q99")
    return float(normalized[0]), int(32000 - token[0]), int(token[0]), float(center[0]), float(back[0])


def sequence(words: dict, name: str) -> None:
    """Inputs, predictions, and labels of a sequence; below, one number from meters to token and back."""
    picture, tokens = Picture(940, 396), [f"a{i}" for i in range(1, 8)] + ["</s>"]
    columns = [("<s>", 40, BLUE), (words["image"], 140, GREEN), (words["prompt"], 300, BLUE)]
    columns += [(token, 38, ORANGE) for token in tokens[:-1]] + [("</s>", 42, BLUE)]
    x = 104
    for row, y in (("input", 52), ("predicted", 108), ("label", 164)):
        picture.text(8, y + 22, words[row], 13, "start", GRAY)
    for i, (label, width, fill) in enumerate(columns):
        picture.box(x, 52, width, 34, fill)
        picture.text(x + width / 2, 74, label, 12.5 if i == 2 else 14)
        if i >= 3:  # its label, and the prediction one position earlier
            token = tokens[i - 3]
            picture.box(x, 164, width, 34, ORANGE)
            picture.text(x + width / 2, 186, token, 14)
            picture.box(x - 36, 108, 34, 34, RED)
            picture.text(x - 19, 130, token, 13)
            picture.arrow(x - 10, 142, x + 8, 164)
        else:
            picture.text(x + width / 2, 186, words["none"], 13, fill=GRAY)
        x += width + 2
    picture.text(8, 26, words["loss"], 15, "start", bold=True)
    low, high, meters = -0.02, 0.02, 0.0075
    normalized, index, token, center, back = follow(meters, low, high)
    picture.text(8, 248, words["one"], 15, "start", bold=True)
    steps = [(words["robot"], f"{meters:.5f} m", f"q01 {low:g}, q99 {high:g}"),
             (words["norm"], f"{normalized:.4f}", "2 (x - q01) / (q99 - q01) - 1"),
             (words["bin"], f"{index}", "np.digitize"), (words["id"], f"{token}", f"32000 - {index}"),
             (words["center"], f"{center:.4f}", "bin_centers"),
             (words["back"], f"{back:.5f} m", "unnormalize")]
    for i, (label, value, rule) in enumerate(steps):
        picture.box(8 + 156 * i, 264, 132, 62, ORANGE if i == 3 else LIGHT)
        picture.text(74 + 156 * i, 283, label, 13, fill=GRAY)
        picture.text(74 + 156 * i, 312, value, 18, bold=True)
        picture.text(74 + 156 * i, 346, rule, 11, fill=GRAY)
        if i:
            picture.arrow(8 + 156 * i - 23, 295, 8 + 156 * i - 2, 295)
    lost = words["lost"].format(abs(back - meters) * 1e3, (high - low) / 255 / 2 * 1e3)
    picture.text(8, 382, lost, 14, "start")
    picture.save(name)


def data(words: dict, chain: dict, name: str) -> None:
    """The path of data from files to ranks."""
    picture = Picture(940, 160)
    for i, (key, lines) in enumerate(chain.items()):
        x = 8 + 187 * i
        picture.box(x, 10, 168, 104, (GREEN, BLUE, ORANGE, ORANGE, RED)[i])
        picture.text(x + 84, 32, words[key], 16, bold=True)
        for j, line in enumerate(lines):
            picture.text(x + 84, 56 + 20 * j, line, 12.5)
        picture.text(x + 84, 138, PLACES[key], 12.5, fill=GRAY)
        if i:
            picture.arrow(x - 18, 62, x - 1, 62)
    picture.save(name)


def zero(words: dict, name: str) -> None:
    """What each ZeRO stage divides: one row per GPU, with lengths proportional to bytes."""
    picture, ranks, byte = Picture(940, 378), 4, 17
    picture.text(16, 26, words["zero"], 16, "start", bold=True)
    parts = {"weight": (2, BLUE), "gradient": (4, GREEN), "copy": (4, ORANGE), "moments": (8, RED)}
    for i, (part, (_, fill)) in enumerate(parts.items()):
        picture.box(16 + 150 * i, 42, 16, 16, fill)
        picture.text(38 + 150 * i, 55, words[part], 14, "start")
    for stage in range(4):
        left, top = 16 + 470 * (stage % 2), 84 + 150 * (stage // 2)
        picture.text(left, top + 12, words["stage"].format(stage), 16, "start", bold=True)
        x = left
        for part, (size, fill) in parts.items():
            size = 2 if part == "gradient" and stage == 0 else size + 2 * (part == "gradient" and stage == 1)
            divided = stage >= {"weight": 3, "gradient": 2, "copy": 1, "moments": 1}[part]
            width = size * byte
            bytes_each = "2 + 4" if size == 6 else f"{size}{'/N' * divided}"
            picture.text(x + (width - 3) / 2, top + 36, bytes_each, 14)
            for rank in range(ranks):
                y = top + 42 + 21 * rank
                picture.box(x, y, width - 3, 17, "white", "#cccccc")
                slice_width = (width - 3) / ranks if divided else width - 3
                picture.box(x + slice_width * rank * divided, y, slice_width, 17, fill)
            x += width + 2
        total = sum_of_bytes(stage, ranks)
        for rank in range(ranks):
            picture.text(x + 4, top + 55 + 21 * rank, words["each"].format(rank, f"{total:g}"), 12, "start")
    picture.save(name)


def sum_of_bytes(stage: int, ranks: int) -> float:
    """Bytes per trained parameter on one GPU. ds_configs/README.md has the same table."""
    weight, gradient = 2 / (ranks if stage == 3 else 1), (2, 6, 4 / ranks, 4 / ranks)[stage]
    return weight + gradient + 12 / (ranks if stage else 1)


if __name__ == "__main__":
    for language, ending in (("en", ""), ("zh", ".zh")):
        sequence(WORDS[language], f"sequence{ending}.svg")
        data(WORDS[language], CHAIN[language], f"data{ending}.svg")
        zero(WORDS[language], f"zero{ending}.svg")
