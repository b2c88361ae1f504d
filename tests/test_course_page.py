"""course/index.html computes what the project's Python does, and course/quiz.md cites lines that exist.

The page's first script has the arithmetic. It runs in Node, or else in Chromium.
"""

import functools
import itertools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import LLAMA_TOKENIZER, ROOT, TINY

from action_tokenizer import IGNORE_INDEX, ActionTokenizer, load_tokenizer
from data import collate, open_tables
from machinery import weights
from machinery.config import TrainConfig, load_config, load_ds_config
from machinery.cost import memory_held, stacks
from machinery.lora import BASE, add_adapters, linear_layers
from machinery.oft import new_mixture, new_vla

PAGE = ROOT / "course/index.html"
NODE = shutil.which("node")
ARITHMETIC = re.search(r'<script id="arithmetic">(.*?)</script>', PAGE.read_text(), re.DOTALL)[1]
WAYS = {"causal": {}, "parallel": {"parallel_decoding": True}, "oft": {"action_head": "l1", "parallel_decoding": True}}
pytestmark = pytest.mark.skipif(not (NODE or CHROMIUM), reason="apt-get install nodejs, or chromium")


@pytest.fixture(scope="module")
def javascript(tmp_path_factory):
    """Evaluate an expression of the page's first script."""
    if NODE:
        def evaluate(expression: str):
            program = f"{ARITHMETIC}\nprocess.stdout.write(JSON.stringify({expression}))"
            return json.loads(subprocess.run([NODE, "-"], input=program, check=True, capture_output=True,
                                             text=True).stdout)
        yield evaluate
        return
    with Browser(tmp_path_factory.mktemp("profile")) as page:
        page.open(PAGE.as_uri())
        yield page.run


# ------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("bins", [8, 32, 256, 2048])
def test_a_number_becomes_the_same_token(bins, javascript):
    tokenizer = ActionTokenizer(32000, bins)
    rng = np.random.default_rng(bins)
    beside = np.nextafter(tokenizer.bins, rng.choice([-2, 2], bins))
    values = np.concatenate([rng.uniform(-1.2, 1.2, 300), tokenizer.bins, tokenizer.bin_centers, beside, [-9, 9]])
    ids = tokenizer.encode(values)
    assert javascript(f"{json.dumps(values.tolist())}.map(x => encode(x, 32000, {bins}))") == ids.tolist()
    some = [*ids.tolist(), 0, 31999, 32000, 32063]  # ids that mean no action, too
    decoded = javascript(f"{json.dumps(some)}.map(id => decode(id, 32000, {bins}))")
    assert decoded == tokenizer.decode(np.array(some)).tolist()


# ------------------------------------------------------------------------------------------------------------
# Attention and labels


@functools.cache
def tiny_model(way: str) -> tuple:
    """-> (model, a batch of two samples, of which the first is padded)."""
    cfg = TrainConfig(**{**TINY, **WAYS[way], "action_dim": 4, "action_chunk": 2})
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)
    mixture = new_mixture(cfg, open_tables(cfg), tokenizer)
    samples = [mixture.sample(0, row) for row in range(0, 2000, 200)]
    samples.sort(key=lambda sample: len(sample["input_ids"]))
    torch.manual_seed(0)
    batch = collate([samples[0], samples[-1]], tokenizer.pad_token_id)
    assert batch["labels"][0, -1] == IGNORE_INDEX  # padding
    return new_vla(cfg, tokenizer).eval(), {key: value for key, value in batch.items() if key != "dataset"}


def drawn(way: str, vla, batch, expression: str) -> str:
    """JavaScript: an expression about `tokens`, the first sample's sequence."""
    labels = batch["labels"][0]
    prompt = int((labels != IGNORE_INDEX).int().argmax()) - 1  # without <s>
    actions = vla.num_action_tokens
    padding = len(labels) - 1 - prompt - actions - 1
    shape = {"patches": vla.num_patches, "prompt": ["word"] * prompt, "actions": actions, "padding": padding}
    return f"(tokens => {expression})(sequence({json.dumps(shape)}))"


@pytest.mark.parametrize("way", WAYS)
def test_a_token_sees_the_same_tokens(way, javascript):
    """Change the input at one position: which hidden states change?"""
    vla, batch = tiny_model(way)
    passed = {}

    def keep(module, arguments, options):
        passed.update(options)

    hook = vla.llm.base_model.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        vla(**batch)
        hook.remove()
        options = {key: value[:1] if torch.is_tensor(value) else value for key, value in passed.items()}
        inputs = options.pop("inputs_embeds")  # (1, S, hidden), of the first sample
        before = vla.llm.base_model(inputs_embeds=inputs, **options).last_hidden_state
        count = inputs.shape[1]
        others = inputs.expand(count, -1, -1) + torch.eye(count)[..., None] * torch.randn(inputs.shape[-1])
        options = {key: value.expand(count, *value.shape[1:]) if torch.is_tensor(value) else value
                   for key, value in options.items()}
        after = vla.llm.base_model(inputs_embeds=others, **options).last_hidden_state
    seen = ((after - before).abs().amax(-1) > 1e-6).T  # (who looks, at whom)
    seen.fill_diagonal_(False)  # a position keeps its own input, beside the attention
    expected = javascript(drawn(way, vla, batch, f"tokens.map((_, i) => tokens.map((_, j) => i !== j && "
                                                 f"maySee('{way}', tokens, i, j)))"))
    assert seen.tolist() == expected


@pytest.mark.parametrize("way", WAYS)
def test_a_token_has_the_same_label(way, javascript):
    """Which positions' hidden states does the loss use?"""
    vla, batch = tiny_model(way)
    kept = []
    hook = vla.llm.base_model.register_forward_hook(lambda _, arguments, output: kept.append(output.last_hidden_state))
    loss, _, true = vla(**batch)
    hook.remove()
    (gradient,) = torch.autograd.grad(loss, kept[0])
    used = (gradient[0].abs().amax(-1) > 0).tolist()
    names = javascript(drawn(way, vla, batch, f"tokens.map((_, i) => predicted('{way}', tokens, i))"))
    assert used == [name is not None for name in names]
    expected = [f"a{i + 1}" for i in range(vla.num_action_tokens)] + ["</s>"] * (way != "oft")
    assert [name for name in names if name] == expected
    labels = javascript(drawn(way, vla, batch, f"tokens.map((_, i) => label('{way}', tokens, i))"))
    behind = labels[vla.num_patches:]  # the text: <s> is before the patches
    places = [i for i, name in enumerate(behind) if name]
    assert batch["labels"][0, places[: len(true[0])]].tolist() == true[0].tolist()


@pytest.mark.parametrize("way", WAYS)
def test_an_actions_place_has_the_same_input(way, javascript):
    """Do the ids of the actions matter to the language model's input, and is it zero?"""
    vla, batch = tiny_model(way)
    inputs = []
    hook = vla.llm.base_model.register_forward_pre_hook(
        lambda _, arguments, options: inputs.append(options["inputs_embeds"][0]), with_kwargs=True)
    with torch.no_grad():
        vla(**batch)
        ids = torch.where(batch["labels"] != IGNORE_INDEX, batch["input_ids"] - 1, batch["input_ids"])
        vla(**{**batch, "input_ids": ids})
    hook.remove()
    kinds = javascript(drawn(way, vla, batch, f"tokens.map(token => token.kind === 'action' ? input('{way}', token) "
                                              ": null)"))
    places = [i for i, kind in enumerate(kinds) if kind]
    changed = bool((inputs[0] - inputs[1])[places].abs().max() > 0)
    zeros = bool(inputs[0][places].abs().max() == 0)
    assert {(changed, zeros)} == {{"own": (True, False), "query": (False, False), "zeros": (False, True)}[kind]
                                  for kind in kinds if kind}


# ------------------------------------------------------------------------------------------------------------
# Memory


def described(name: str) -> tuple[TrainConfig, object]:
    """The config and tokenizer of a model on the page."""
    if name == "openvla":
        vision, llm, strategy = weights.PRISMATIC["prism-dinosiglip-224px+7b"]
        values = {**weights.prismatic_config(vision, llm, strategy), "tokenizer": str(LLAMA_TOKENIZER)}
        cfg = TrainConfig(**values, action_dim=7)
    else:
        file = {"demo": "demo", "mt50": "metaworld_mt50"}[name]
        cfg = load_config(ROOT / f"configs/{file}.yaml", ["action_dim=4", "proprio_dim=4"])
    return cfg, load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)


@pytest.mark.parametrize("name", ["demo", "mt50", "openvla"])
def test_zero_divides_the_same_bytes(name, javascript):
    cfg, tokenizer = described(name)
    with torch.device("meta"):
        vla = new_vla(cfg, tokenizer)
    facts = {"parameters": vla.count_parameters()[0],
             "added": sum(p.numel() for key, p in vla.named_parameters() if key.split(".")[0] not in BASE),
             "adapted": sum(layer.in_features + layer.out_features for layer in linear_layers(vla).values()),
             "stacks": [[len(blocks), *rest] for blocks, *rest, _ in stacks(vla, 40)]}
    shown = javascript(f"MODELS.{name}")
    assert (ROOT / "configs" / shown.pop("config")).exists() and shown.pop("name")
    assert shown == facts
    cases, expected = [], []
    for rank in (0, 32):
        if rank:
            with torch.device("meta"):
                add_adapters(vla, rank, 16, 7)
        for stage, gpus, batch, recompute in itertools.product(range(4), (1, 8), (1, 16), (False, True)):
            vla.cfg = cfg.model_copy(update={"per_device_batch_size": batch})
            ds_config = load_ds_config(ROOT / f"ds_configs/zero{stage}.json")
            expected.append(memory_held(vla, ds_config, gpus, recompute))
            cases.append({"stage": stage, "gpus": gpus, "rank": rank, "batch": batch, "recompute": recompute})
    sizes = javascript(f"{json.dumps(cases)}.map(knobs => memory(MODELS.{name}, knobs))")
    for case, ours, theirs in zip(cases, sizes, expected, strict=True):
        assert ours == pytest.approx(theirs), case


# ------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="apt-get install chromium")
@pytest.mark.parametrize("width, dark", [(1280, False), (360, True)])
def test_a_visitor_drags_and_clicks(width, dark, tmp_path):
    with Browser(tmp_path / "profile", width, 900, dark) as page:
        page.open(PAGE.as_uri())

        def text(selector: str) -> str:
            return page.run(f"document.querySelector({json.dumps(selector)}).textContent")

        page.run("value.value = 1; value.oninput()")
        assert (text("#bin"), text("#id"), text("#back")) == ("256", "31744", "0.9961")
        page.run("document.querySelectorAll('#ways button')[2].click()")
        page.run("document.querySelectorAll('#tokens button')[0].click()")
        assert page.run("document.querySelectorAll('#tokens .hidden').length") == 1  # padding
        before = text("#total")
        page.run("stage.value = 3; stage.oninput()")
        assert float(text("#total").split()[0]) < float(before.split()[0])
        for language in ("zh", "en", "zh"):
            page.run("language.click()")
            assert page.run("document.documentElement.lang") == language
            assert page.run("document.documentElement.scrollWidth") <= width
            shown = page.run("document.body.innerText")
            assert "undefined" not in shown and bool(re.search("[一-鿿]{4}", shown)) == (language == "zh")
        assert page.run("getComputedStyle(document.body).backgroundColor") == (
            "rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")


def test_it_needs_no_network():
    assert not re.search(r"https?://(?!www\.w3\.org)|src=|<link", PAGE.read_text())


# ------------------------------------------------------------------------------------------------------------
# The quiz


CITED = re.compile(r"`([\w/]+\.py):(\d+)(?:-(\d+))?`\W{1,2}`([^`]+)`")  # `data.py:12-14`: `fragment`


@pytest.mark.parametrize("page", ["quiz.md", "quiz.zh.md"])
def test_the_fragments_are_on_the_cited_lines(page):
    answers = re.findall(r"<details>(.*?)</details>", (ROOT / "course" / page).read_text(), re.DOTALL)
    assert len(answers) == 20
    wrong = []
    for answer in answers:
        assert CITED.findall(answer), answer
        for file, first, last, fragment in CITED.findall(answer):
            lines = (ROOT / file).read_text().splitlines()
            cited = " ".join(" ".join(lines[int(first) - 1 : int(last or first)]).split())
            if fragment not in cited:
                found = [number for number, line in enumerate(lines, 1) if fragment in line]
                wrong.append(f"{file}:{first}: {fragment!r} is on {found}")
    assert wrong == []


def test_both_languages_cite_the_same():
    english, chinese = (CITED.findall((ROOT / "course" / page).read_text()) for page in ("quiz.md", "quiz.zh.md"))
    assert english == chinese
