"""CRPO in TRL: a tiny model, four prompts, two steps; `python docs/examples/trl_crpo.py [folder]`.

It needs `pip install "crpo-fast[integrations]" "trl<1.17"`. With a real model: its hub name in
place of `folder`, your data set and rewards, and no `use_cpu`.
"""

import sys
import tempfile

from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen3Config
from trl import GRPOConfig

from crpo_fast.integrations.trl import CRPOTrainer, EntropyConfig
from crpo_fast.models import train_tokenizer
from crpo_fast.stages import StageGrammar

GRAMMAR = StageGrammar.preset("mental_r1")
POSTS = ["I cannot sleep.", "My sister helps me.", "A long day at work.", "It is fine."]


def make_model(folder: str) -> None:
    """A decoder of two layers, and a tokenizer in which every tag is one token."""
    tokenizer = train_tokenizer(POSTS, 258 + len(GRAMMAR.tags), GRAMMAR.tags)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    AutoModelForCausalLM.from_config(Qwen3Config(**sizes, **heads)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def reward(completions: list[str], **_: object) -> list[float]:
    """More different letters are better."""
    return [len(set(text)) / 26 for text in completions]


def main(folder: str) -> list[dict]:
    """Train, and return what was logged."""
    make_model(folder)
    trainer = CRPOTrainer(
        folder,
        reward,
        GRPOConfig(
            folder + "/trained",
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=32,
            loss_type="bnpo",
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        # the prompt opens the first stage; the completion closes it
        Dataset.from_dict({"prompt": [f"{post}\n{GRAMMAR.prefill}" for post in POSTS]}),
        stages="mental_r1",
        entropy=EntropyConfig(magnitude=0.06, reference_length=80),
    )
    trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    for entry in main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()):
        sys.stdout.write(f"{entry}\n")
