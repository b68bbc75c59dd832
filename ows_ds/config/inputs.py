"""What a run starts from: the recipe's sections model and data."""

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from ows_ds.config.settings import MOST, Count, Expected, MayChange, Planned, Positive, Settings, Wrong

SPLIT = r"\w+(\.\w+)*(\[(-?\d+%?)?:(-?\d+%?)?\])?"
Split = Annotated[
    str,
    Field(pattern=f"^(?:{SPLIT})$"),
    Expected("a split, such as train, or a part of one, such as train[:1%] or train[100:]"),
]


class Model(Settings):
    """The pre-trained model."""

    renamed: ClassVar[Mapping[str, str]] = {"attention": "it is called {prefix}attn_implementation"}

    path: MayChange[Annotated[str, Expected("text, a folder or a name on the hub")]] = Field(min_length=1)
    """Folder of a Hugging Face checkpoint, or a name on the hub. Required."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null: the newest."""
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Number format of the weights; coordinates and moments are float32, or float64 under float64."""
    frozen: MayChange[Annotated[Literal["same", "int8", "fp8", "nf4"], Planned()]] = "same"
    """Number format of the matrices of layers that do not train at the moment: as model.dtype, in 8 bits (int8, fp8)
    or in 4 (nf4). The real weights rest in the host's memory or the checkpoint's files, and are what is exported. auto:
    the same where it fits."""
    fp8_matmul: MayChange[Literal["auto", "always", "never"]] = "auto"
    """Under model.frozen fp8, products of frozen matrices in fp8, with tokens rounded to it: always, never, or auto:
    where the GPU has them."""
    attn_implementation: MayChange[str | None] = None
    """Attention kernel of transformers, such as sdpa or flash_attention_2; null: its own choice."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""

    def contradictions(self) -> Iterator[Wrong]:
        if self.fp8_matmul == "always" and self.frozen != "fp8":
            yield Wrong("fp8_matmul", "expected auto, or model.frozen fp8", ("frozen",))
        if "/" in (self.attn_implementation or "") and not self.trust_remote_code:
            right = "expected a kernel of transformers, or model.trust_remote_code true: this one is code from the hub"
            yield Wrong("attn_implementation", right, ("trust_remote_code",))


Format = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "multiple_choice",
    "question_answer",
    "text",
    "preference",
    "labelled",
]


class Source(Settings):
    """One of several files or data sets."""

    path: Annotated[str, Expected("a file, a folder or a name on the hub")]
    """File, folder or name on the hub, as data.train alone."""
    weight: Positive | None = None
    """Its share of the rows of an epoch, in proportion to those of the others (1 where one has none); null for all:
    every row once an epoch."""
    subset: str | None = None
    """As data.train_subset; null: that one."""
    split: Split | None = None
    """As data.train_split; null: that one."""
    format: Format = "auto"
    """As data.format; auto: that one."""


def _shape(value: object) -> str | None:
    return "path" if isinstance(value, str) else "list" if isinstance(value, list) else None


Sources = Annotated[
    Annotated[str, Tag("path")]
    | Annotated[
        list[
            Annotated[
                Source,
                BeforeValidator(
                    lambda v: {"path": v} if isinstance(v, str) else v, json_schema_input_type=str | Source
                ),
            ]
        ],
        Field(min_length=1),
        Tag("list"),
    ],
    Discriminator(_shape),
    Expected("text, or a list of sources such as [{path: a.jsonl, weight: 2}, {path: b.jsonl}]"),
]


class Data(Settings):
    """The rows to train on and to evaluate with."""

    train: MayChange[Sources | None] = None
    """File (.jsonl, .json, .parquet, .csv), folder of a data set, or its name on the hub; or a list of them, each a
    text or a mapping of path, weight, subset, split and format. Required by train, and by score for calibration."""
    eval: MayChange[Sources | None] = None
    """The same for held-out rows, without weights; null: no evaluation."""
    train_subset: str | None = None
    """Subset (configuration) of the data set that data.train names, such as main; null: its only one. Files have
    none."""
    eval_subset: MayChange[str | None] = None
    """The same for data.eval."""
    train_split: Split = "train"
    """Split of the data set that data.train names, or a part of it such as train[:1%] or train[100:]. Of a file the
    name is ignored, the part is taken."""
    eval_split: MayChange[Split] = "test"
    """The same for data.eval."""
    max_length: int = Field(512, ge=2, le=MOST)
    """Tokens of a row; longer rows are cut at the end. Under data.packing, of a sequence."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that are trained: the assistant's turns with their end mark, or all of them."""
    format: Format = "auto"
    """Columns of a row; auto recognises messages, sharegpt (conversations), alpaca (instruction, input, output),
    prompt_completion (prompt, completion), multiple_choice (question, choices, answer), question_answer (question,
    answer) and text by their names, and for losses that compare answers preference (chosen, rejected, perhaps prompt)
    and labelled (prompt, completion, label)."""
    template: Literal["auto", "chat", "plain", "alpaca"] = "auto"
    """How a row with a task and an answer is written: the tokenizer's chat template, plain text, or Stanford Alpaca's
    prompt; auto: chat where the tokenizer has a template, otherwise plain."""
    chat_template: str | None = None
    """Jinja file of a chat template in place of the tokenizer's; it is saved with the model."""
    packing: bool = False
    """Join several rows to one sequence of up to data.max_length tokens, without attention from one to another."""
    streaming: bool = False
    """Read the training rows while training, in blocks, instead of all before it; train.steps says when to stop."""
    buffer_size: Count = 16384
    """Rows of a block under data.streaming; they are shuffled within it."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What a row that cannot be used does: stop the run with its place and reason, or skip it; those skipped are
    counted, and the first one is named."""
    cache: MayChange[str | None] = None
    """Folder of tokenized rows, which later runs read; null: ows_ds in the cache of Hugging Face (HF_HOME)."""

    def contradictions(self) -> Iterator[Wrong]:
        train = self.train if isinstance(self.train, list) else []
        if isinstance(self.eval, list) and any(source.weight is not None for source in self.eval):
            yield Wrong("eval", "leave the weights out: every held-out row counts once")
        if self.streaming and len(train) > 1 and all(source.weight is None for source in train):
            right = "expected weights: under data.streaming sources are read side by side"
            yield Wrong("train", right, ("streaming",))
        if self.streaming and any("[" in (source.split or self.train_split) for source in train or [Source(path="")]):
            yield Wrong("train_split", "expected a whole split under data.streaming", ("streaming", "train"))
