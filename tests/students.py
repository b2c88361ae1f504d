"""Answers to the course's exercises as a student might write them, and five mistakes in each.

{exercise: (a right answer, written differently from the project's own,
            [(replace this, by this, a word of the sentence that the check must then print), ...])}
"""

ANSWERS = {
    1: ("""
def encode(self, actions):
    actions = np.asarray(actions, dtype=np.float64)
    if np.isnan(actions).any() or np.isinf(actions).any():
        raise UserError("not a number")
    inside = np.minimum(np.maximum(actions, -1), 1)
    edges_below = (inside[..., None] >= self.bins).sum(-1)
    return self.vocab_size - edges_below
""", [("self.vocab_size - edges_below", "self.vocab_size - 1 - edges_below", "off by one"),
      ("inside[..., None] >= self.bins", "inside[..., None] >= self.bins[1:]", "off by one"),
      ("self.vocab_size - edges_below", "self.vocab_size - self.n_bins + edges_below - 1", "reversed"),
      ("np.minimum(np.maximum(actions, -1), 1)", "actions", "not clipped"),
      ("np.isnan(actions).any() or np.isinf(actions).any()", "len(actions) == 0", "NaN"),
      (" or np.isinf(actions).any()", "", "infinity"),
      ("self.vocab_size - edges_below", "(self.vocab_size - edges_below).astype(float)", "float64"),
      ("inside[..., None] >= self.bins", "inside[..., None] > self.bins", "right=True"),
      ("(inside[..., None] >= self.bins).sum(-1)", "np.minimum((inside + 1) / 2 * self.n_bins, self.n_bins - 1).astype(int) + 1",
       "equal width"),
      ("(inside[..., None] >= self.bins).sum(-1)", "np.abs(inside[..., None] - self.bins).argmin(-1) + 1", "nearest"),
      ("self.bins", "np.linspace(-1, 1, 256)", "n_bins")]),
    2: ("""
def embed(self, images, input_ids, proprio=None):
    batch, pictures = images.shape[:2]
    words = self.llm.get_input_embeddings()(input_ids)
    patches = self.projector["projector"](self.patch_features(self.pixel_values(images)))
    patches = patches.reshape(batch, -1, patches.shape[-1])
    parts = [words[:, 0:1], patches]
    if proprio is not None:
        parts.append(self.proprio_projector(proprio).unsqueeze(1))
    parts.append(words[:, 1:])
    return torch.cat(parts, 1)
""", [("parts = [words[:, 0:1], patches]", "parts = [patches, words[:, 0:1]]", "before <s>"),
      ("words[:, 1:])", "words)", "twice"),
      ("words[:, 1:])", "words[:, 2:])", "lost"),
      ("if proprio is not None", "if self.cfg is None", "state is not used"),
      ("parts.append(self", "parts.insert(1, self", "state comes before"),
      ("torch.cat(parts, 1)", "torch.cat([words, patches], 1)", "after the text"),
      ("parts.append(words[:, 1:])", "parts.insert(2, words[:, 1:])", "state comes after"),
      ("patches.reshape(batch, -1, patches.shape[-1])", "patches.reshape(batch, pictures, -1, patches.shape[-1])[:, 0]",
       "first picture")]),
    3: ("""
def draw(self, first, count):
    dataset, visit = interleave(self.shares, first, count)
    size = self.sizes[dataset]
    epoch = visit // size
    key = mix_bits(self.cfg.seed, dataset, epoch)
    place = permute(visit % size, size, key)
    return dataset, self.rows(dataset, place), epoch
""", [("mix_bits(self.cfg.seed, dataset, epoch)", "mix_bits(dataset, epoch)", "seed"),
      ("mix_bits(self.cfg.seed, dataset, epoch)", "mix_bits(self.cfg.seed, dataset)", "epoch must"),
      ("mix_bits(self.cfg.seed, dataset, epoch)", "mix_bits(epoch, self.cfg.seed)", "dataset must"),
      ("permute(visit % size, size, key)", "visit % size", "order of the file"),
      ("permute(visit % size, size, key)", "np.random.randint(0, size)", "arguments and the seed alone"),
      ("permute(visit % size, size, key)", "(mix_bits(key, visit) % size.astype(np.uint64)).astype(np.int64)", "repeat"),
      ("self.rows(dataset, place)", "self.rows(0, place)", "rows of the first dataset"),
      ("self.rows(dataset, place)", "place", "row in the table")]),
    4: ("""
def forward(self, images, input_ids, labels, proprio=None, prefix_length=0):
    inputs = self.embed(images, input_ids)
    patches = inputs.shape[1] - labels.shape[1]
    hidden = self.llm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    logits = self.llm.get_output_embeddings()(hidden).float()[:, patches:]
    before, after = logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(before.reshape(-1, before.shape[-1]), after.reshape(-1))
    count = self.num_action_tokens
    kept = after != IGNORE_INDEX
    predicted = before.argmax(-1)[kept].view(len(labels), -1)[:, :count]
    true = after[kept].view(len(labels), -1)[:, :count]
    return loss, predicted, true
""", [("before, after = logits[:, :-1], labels[:, 1:]", "before, after = logits[:, 1:], labels[:, 1:]", "shifted by one:"),
      ("after.reshape(-1))", "input_ids[:, 1:].reshape(-1))", "mask"),
      ("[:, patches:]", "[:, : labels.shape[1]]", "patches are forgotten"),
      ("[:, :count]", "", "</s> is among"),
      ("after.reshape(-1))", "torch.where(after == 2, IGNORE_INDEX, after).reshape(-1))", "</s> is not in the loss"),
      ("before.reshape(-1, before.shape[-1])", "before.softmax(-1).reshape(-1, before.shape[-1])", "softmax"),
      ("return loss", "return loss.detach()", "detach"), ("return loss", "return loss.item()", "item"),
      ("after.reshape(-1))", "after.reshape(-1), reduction='sum')", "mean")]),
    5: ("""
def accumulation_steps(cfg, world_size):
    wanted = cfg.expected_world_size
    if wanted is not None and wanted != world_size:
        raise UserError("another number of GPUs")
    at_a_time = cfg.per_device_batch_size * world_size
    steps = cfg.global_batch_size // at_a_time
    if steps * at_a_time != cfg.global_batch_size:
        raise UserError("does not divide")
    return steps
""", [("cfg.per_device_batch_size * world_size", "cfg.per_device_batch_size", "ranks"),
      ("cfg.per_device_batch_size * world_size", "world_size", "per_device_batch_size is forgotten"),
      ("if steps * at_a_time != cfg.global_batch_size", "if False", "rounded down"),
      ("steps = cfg.global_batch_size // at_a_time", "return -(-cfg.global_batch_size // at_a_time)", "rounded up"),
      ("wanted is not None and wanted != world_size", "False", "ignored"),
      ("wanted is not None and wanted", "wanted", "None is refused"),
      ("wanted != world_size", "wanted > world_size", "ignored"),
      ("return steps", "return cfg.global_batch_size / at_a_time", "2.0"),
      ("steps = cfg.global_batch_size // at_a_time", "return cfg.global_batch_size / at_a_time", "fraction")]),
    6: ("""
def unnormalize(actions, stats, kind):
    if kind == "normal":
        back = np.array(stats["mean"]) + actions * np.array(stats["std"])
    else:
        low = np.array(stats[BOUNDS[kind][0]])
        high = np.array(stats[BOUNDS[kind][1]])
        middle, half = (high + low) / 2, (high - low) / 2
        back = middle + half * actions
    keep = ~np.array(stats.get("mask", np.ones(actions.shape[-1], bool)))
    back = np.array(back)
    back[..., keep] = actions[..., keep]
    return back
""", [("(high - low) / 2\n", "(high - low)\n        middle = high\n", "twice"),
      ("middle + half * actions", "low + (high - low) * actions", "begin at -1"),
      ("middle + half * actions", "half * (actions + 1)", "lower bound"),
      ("BOUNDS[kind][0]", "'min'", "expected"),
      ("back[..., keep] = actions[..., keep]", "pass", "mask is forgotten"),
      ("keep = ~", "keep = ", "wrong way round"),
      ('+ actions * np.array(stats["std"])', '* 0 + (actions - np.array(stats["mean"])) / np.array(stats["std"])',
       "normalized again"),
      ('kind == "normal"', "kind == 0", "'normal' is forgotten")]),
    7: ("""
def most_frequent_tokens(mixture, dataset, rows):
    ids = []
    for d in sorted(set(dataset.tolist())):
        actions = mixture.actions(d, rows[dataset == d])
        ids.append(mixture.action_tokenizer.encode(actions.reshape(len(actions), -1)))
    best = []
    for column in np.concatenate(ids).T:
        values, counts = np.unique(column, return_counts=True)
        best.append(values[counts.argmax()])
    return np.array(best)
""", [("mixture.actions(d,", "mixture.actions(0,", "statistics of another dataset"),
      ("values[counts.argmax()]", "counts.argmax()", "place in a list"),
      ("values[counts.argmax()]", "counts.max()", "how often"),
      ("values[counts.argmax()]", "column[0]", "first frame"),
      ("values[counts.argmax()]", "int(np.round(column.mean()))", "mean id"),
      ("values[counts.argmax()]", "int(np.median(column))", "median"),
      ("np.concatenate(ids).T", "ids[0].T", "first dataset"), ("np.concatenate(ids).T", "ids[-1].T", "last dataset"),
      ("np.concatenate(ids).T", "[np.concatenate(ids).ravel()]", "one id for")]),
    8: ("""
def with_advantages(episodes, args, action_dim):
    rewards = [float(episode["success"]) for episode in episodes]
    mean = sum(rewards) / len(rewards)
    deviation = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
    found = []
    for episode, reward in zip(episodes, rewards):
        advantage = (reward - mean) / (deviation + 1e-6)
        if args.method == "cloning":
            advantage = reward
        left = episode["executed"]
        for decision in episode["decisions"]:
            weight = np.zeros(len(decision["old"]), np.float32)
            if advantage != 0:
                weight[: min(left, args.execute) * action_dim] = 1
            found.append(dict(decision, advantage=np.array([advantage], np.float32), weight=weight))
            left -= args.execute
    return found
""", [("(reward - mean) / (deviation", "reward / (deviation", "mean is not subtracted"),
      ("(reward - mean) / (deviation + 1e-6)", "reward", "reward itself"),
      ("(reward - mean) / (deviation + 1e-6)", "reward - mean", "not divided"),
      ("(reward - mean) / (deviation", "(mean - reward) / (deviation", "sign"),
      (" ** 0.5", "", "variance"),
      ("for reward in rewards) / len(rewards)", "for reward in rewards) / (len(rewards) - 1)", "n - 1"),
      ("(deviation + 1e-6)", "np.float64(deviation)", "NaN"),
      ("weight[: min(left, args.execute) * action_dim] = 1", "weight[:] = 1", "weights are forgotten"),
      ("min(left, args.execute) * action_dim", "min(left, args.execute)", "steps are not tokens"),
      ("min(left, args.execute)", "args.execute", "end of the episode"),
      ("left -= args.execute", "pass", "from the episode's start"),
      ("min(left, args.execute)", "left", "tail of a chunk"),
      ("if advantage != 0:", "if True:", "has weights"),
      ('args.method == "cloning"', "False", "method is ignored")]),
}
