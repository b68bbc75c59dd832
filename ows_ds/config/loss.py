"""What is learned: the recipe's section loss."""

from typing import Literal

from ows_ds.config.settings import NotNegative, Positive, Settings

BETAS = {"dpo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}  # where a recipe gives none: TRL's, SimPO's paper's
REFERENCE = ("dpo", "kto")  # compare with the model as it was before training
ROWS = {"dpo": "preference", "orpo": "preference", "simpo": "preference", "kto": "labelled", "reward": "preference"}
"""The format of the rows of a loss that compares answers; `Loss.rows`."""


class Loss(Settings):
    """What is learned of the rows."""

    name: Literal["sft", "dpo", "orpo", "simpo", "kto", "reward"] = "sft"
    """sft: the cross entropy of the answers. dpo, orpo, simpo: of two answers to prefer one (columns chosen, rejected
    and perhaps prompt); kto: from answers that are right or wrong (prompt, completion, label). dpo and kto compare with
    the model before training, whose log-probabilities are computed once. reward: the model gets a head that gives
    answers a number, the chosen one a larger one."""
    beta: Positive | None = None
    """Strength of the preference; null: 0.1, under simpo 2."""
    simpo_gamma: NotNegative = 1.0
    """The margin that simpo asks for, gamma of its paper."""
    desirable_weight: NotNegative = 1.0
    """Weight of right answers under kto."""
    undesirable_weight: NotNegative = 1.0
    """Weight of wrong answers under kto."""

    @property
    def rows(self) -> str:
        """How rows are read: "" as examples, or a format of `ROWS`, whose sequences are of two rows each."""
        return ROWS.get(self.name, "")

    @property
    def strength(self) -> float:
        """beta."""
        return BETAS.get(self.name, 0.0) if self.beta is None else self.beta
