# %% en
# # 2. The picture between the words
#
# A language model reads a row of vectors, one for each word. A camera image is 84 x 84 pixels. **How does a picture get into
# a sentence?**
#
# Read `model.py` beside this notebook: `VLA.embed` and `VLA.forward`. The model here has random weights, because the
# question is only what goes where.
# %% zh
# # 2. 图像放在词之间
#
# 语言模型读的是一排向量，一个词一个。相机图像却是 84 x 84 个像素。**图像怎么放进一句话里？**
#
# 请对照 `model.py` 阅读：`VLA.embed` 和 `VLA.forward`。这里的模型用随机权重，因为我们只关心什么东西放在哪里。
# %%
import textwrap

import torch

from action_tokenizer import load_tokenizer
from data import Mixture, open_tables
from machinery.config import load_config
from model import VLA

cfg = load_config("configs/demo.yaml", ["action_dim=4"])
tokenizer = load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)
mixture = Mixture(cfg, open_tables(cfg), tokenizer)
sample = mixture.sample(0, 0)  # dataset 0, frame 0
print("picture", sample["images"].shape, "text", sample["input_ids"].shape)
words = tokenizer.convert_ids_to_tokens(sample["input_ids"].tolist())
marked = [f"{word}:{label}" if label != -100 else word
          for word, label in zip(words, sample["labels"], strict=True)]
print(textwrap.fill("  ".join(marked), 90))
# %% en
# That is one training sample: a picture, and 25 ids. `<s>` begins a text and `</s>` ends it; `Ġ` is how this vocabulary
# writes a space, `Ċ` a new line. The instruction is always put in lower case. Instead of giving up words, the demo's small
# vocabulary has 256 more, with the ids 512 to 767. So 767 means -1.0 and 512 means 1.0 here.
#
# Only the last five ids have a label: four numbers of the action, and `</s>`. All others have -100, which means: do not
# learn this.
#
# Now the picture. It is cut into patches, and two *vision towers* (networks that learned to see) make a vector of features
# of each patch. The *projector*, three linear layers, makes that vector as long as a word's, so that the language model
# reads a patch as if it were a word. In the comments, B counts samples, N pictures, and L ids; `proprio` is the robot's state,
# which the demo does not use.
# %% zh
# 这就是一个训练样本：一张图像和 25 个 id。`<s>` 开头，`</s>` 结尾；`Ġ` 是这个词表里空格的写法，`Ċ` 是换行。指令一律转成小写。演示用的小词表没有占用原来的词，而是另加了 256 个，id 是 512 到 767，所以这里 767 表示 -1.0，512 表示 1.0。
#
# 只有最后五个 id 有标签：动作的四个数，加上 `</s>`。其余都是 -100，意思是：不学这个位置。
#
# 再看图像。图像切成小块，两个*视觉塔*（学过看图的网络）把每一块变成一个特征向量；*投影层*（三个线性层）再把它变得和词向量一样长，语言模型读图像块就和读词一样。注释里 B 是样本数，N 是图像数，L 是 id 数；`proprio` 是机器人状态，演示里不用。
# %%
show(VLA.embed, "text = ", "return")
# %% en
# **Predict.** Patches of 14 x 14 pixels cut the picture into 6 x 6. The text has 25 ids. How long is the sequence that the
# language model reads? Then: if *one pixel* in the corner of the picture changes (`dot` in the code), at how many of its
# positions does the input change?
# %% zh
# **猜一猜。** 图像切成 14 x 14 像素的小块，共 6 x 6 块；文本有 25 个 id。语言模型读到的序列有多长？再猜：图像角上有*一个像素*变了（代码里的 `dot`），有多少个位置的输入会变？
# %%
torch.manual_seed(7)
vla = VLA(cfg, tokenizer).eval()
image = torch.from_numpy(sample["images"])[None]  # (1, 1, 84, 84, 3): batch, pictures, ...
ids = torch.from_numpy(sample["input_ids"])[None]  # (1, 25)


def changed(before, after):
    """At which positions do two sequences differ?"""
    places = torch.nonzero((before - after).abs().amax(-1)[0] > 1e-6).flatten().tolist()
    return f"positions {places[0]} to {places[-1]}, {len(places)} of them"


with torch.no_grad():
    inputs = vla.embed(image, ids)
    print("sequence", tuple(inputs.shape))
    dot = image.clone()
    dot[0, 0, 0, 0, 0] = 255 - dot[0, 0, 0, 0, 0]
    print("one dot changed:", changed(inputs, vla.embed(dot, ids)))
    words = ids.clone()
    words[0, 10] = words[0, 12]  # "press" becomes "button"
    print("one word changed:", changed(inputs, vla.embed(image, words)))
# %% en
# **What you saw.** The sequence has 61 positions: `<s>` at 0, the 36 patches at 1 to 36, then the other 24 ids. One pixel
# changed all 36 patches, because inside a vision tower every patch looks at every other. One word changed one position.
#
# ## Who can see whom?
#
# In the language model, attention is *causal*: a position sees itself and the positions before it. **Predict:** after
# the language model, at which positions does the changed word matter? Can a patch know the instruction?
# %% zh
# **看到了什么。** 序列有 61 个位置：0 是 `<s>`，1 到 36 是 36 个图像块，然后是其余 24 个 id。一个像素改变了全部 36 个图像块，因为在视觉塔里每个图像块都看得到其他所有图像块。一个词只改变了一个位置。
#
# ## 谁看得到谁？
#
# 语言模型的注意力是*因果*的：每个位置只看得到自己和前面的位置。**猜一猜：** 经过语言模型之后，改掉的那个词影响哪些位置？图像块知道指令是什么吗？
# %%
with torch.no_grad():
    def read(sequence):
        return vla.llm.base_model(inputs_embeds=sequence, use_cache=False).last_hidden_state

    print("one word changed:", changed(read(inputs), read(vla.embed(image, words))))
    print("one dot changed: ", changed(read(inputs), read(vla.embed(dot, ids))))
# %% en
# **What you saw.** The word at position 46 changes 46 to 60, everything from itself on. The patches, 1 to 36, are the same
# whatever the instruction says: the picture is read *before* the question. Looking for the right object happens in the
# text positions, which see both. A changed pixel reaches positions 1 to 60: everything but `<s>`.
#
# That is why the place matters. If the patches came last, the first number of the action would be predicted before the
# picture had been seen.
# %% zh
# **看到了什么。** 位置 46 的词改变了 46 到 60，也就是从它自己往后的一切。图像块（1 到 36）不管指令写什么都一样：图像是在问题*之前*读的。找到该找的物体，是在文本的位置上完成的，那里两者都看得到。改一个像素，影响 1 到 60：除 `<s>` 外的一切。
#
# 所以放在哪里很要紧。如果图像块放在最后，模型还没看到图像，就要预测动作的第一个数了。
# %% en
# ## Exercise 2
#
# Write `VLA.embed`: `python course/check.py 2`
#
# <details><summary>A hint</summary>
#
# Count: `text[:, :1]` is `<s>`, `text[:, 1:]` the rest. A sample may have several pictures: `patch_features` gets them as
# B * N pictures and you need (B, N * patches, features), which is `unflatten`, then `flatten`.
#
# </details>
#
# {answer}
#
# Next: [3. Which frame comes when](3_order.ipynb)
# %% zh
# ## 练习 2
#
# 写出 `VLA.embed`：`python course/check.py 2 --zh`
#
# <details><summary>提示</summary>
#
# 数一数：`text[:, :1]` 是 `<s>`，`text[:, 1:]` 是其余部分。一个样本可以有几张图像：`patch_features` 拿到的是 B * N 张，而你需要 (B, N * patches, features)：先 `unflatten`，再 `flatten`。
#
# </details>
#
# {answer}
#
# 下一课：[3. 什么时候轮到哪一帧](3_order.ipynb)
