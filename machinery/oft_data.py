"""What OpenVLA-OFT's head learns from: VLA's batches, with the actions as numbers beside tokens."""

import numpy as np

from data import Mixture
from machinery.config import TrainConfig
from machinery.oft import normalize_state


def mixture_class(cfg: TrainConfig) -> type[Mixture]:
    """The samples that a config's model learns from."""
    return Mixture if cfg.action_head == "tokens" else OftMixture


class OftMixture(Mixture):
    """A mixture whose samples also have `actions` (action_chunk, action_dim) float32."""

    def sample(self, dataset: int, row: int, epoch: int = 0, augment_seed: int | None = None
               ) -> dict:
        """As Mixture.sample; the state is normalized as it will be when the policy acts."""
        sample = super().sample(dataset, row, epoch, augment_seed)
        sample["actions"] = self.actions(dataset, np.array([row]))[0]
        if self.cfg.use_proprio:
            state = self.tables[dataset].frames[row]["proprio"].astype(np.float64)
            stats = self.statistics[self.names[dataset]]["proprio"]
            state = normalize_state(state, stats, self.cfg.action_normalization)
            sample["proprio"][: len(state)] = state
        return sample
