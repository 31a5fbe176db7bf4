"""One measurement of transformers' Trainer with peft, or of TRL's SFTTrainer, in a process of its own."""

from __future__ import annotations

import json
import tempfile
from typing import TYPE_CHECKING, Any

import datasets
import torch
import transformers
from measuring import RANK, adapter_gradients, arguments, documents_of, measured_pass
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

if TYPE_CHECKING:
    import argparse

PROJECTIONS = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"),
]
DOCUMENTS_PER_STEP = 4


def trainer_of(asked: argparse.Namespace, rows: list[dict[str, Any]]) -> Any:
    """The trainer that was asked for, as its documentation sets it up."""
    model = transformers.AutoModelForCausalLM.from_pretrained(asked.job / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked.job / "model")
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS)
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "num_train_epochs": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": asked.batch,
        "gradient_accumulation_steps": max(1, DOCUMENTS_PER_STEP // asked.batch),
        "gradient_checkpointing": asked.checkpointing,
    }
    dataset = datasets.Dataset.from_list(rows)
    if asked.trainer == "trl":
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(
            model,
            args=SFTConfig(**common, bf16=False, max_length=None),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=config,
        )
    return transformers.Trainer(
        get_peft_model(model, config),
        args=transformers.TrainingArguments(**common),
        train_dataset=dataset,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
    )


def mean_loss(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """Of a document alone."""
    ids, labels = (torch.tensor(row[name])[None] for name in ("input_ids", "labels"))
    return model(input_ids=ids, labels=labels).loss


def main() -> None:
    """Measure what was asked."""
    asked = arguments(__doc__)
    rows = documents_of(asked.job)
    trainer = trainer_of(asked, rows)
    if asked.measure == "documents":
        found = adapter_gradients(trainer.model, rows, lambda row: mean_loss(trainer.model, row))
        save_file(found, asked.out)
        return
    tokens = sum(len(row["input_ids"]) for row in rows)
    supervised = sum(label != -100 for row in rows for label in row["labels"])
    result = measured_pass(asked, trainer.model, trainer.train, tokens=tokens, supervised=supervised)
    asked.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
