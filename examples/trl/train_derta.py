"""
Safety-tune a model with DeRTa in TRL, from the command line or a YAML file.

    python examples/trl/train_derta.py --config examples/trl/llama3_8b_full.yaml
    python examples/trl/train_derta.py --model_name_or_path my-model --safety triples.jsonl --output_dir my-safe-model

Every option of `trl.SFTConfig`, `trl.ModelConfig` and the DeRTa knobs can stand in the file or on the command line.
"""

from dataclasses import dataclass, field

import torch
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from derta_plugins.adapters.trl import DeRTaSFTConfig, DeRTaSFTTrainer
from derta_plugins.readers import load_records


@dataclass
class DataArguments:
    """Files or hub names of the three kinds of rows."""

    safety: str = field(metadata={"help": "Triples: a harmful prompt with a safe and a harmful response."})
    helpful: str | None = field(default=None, metadata={"help": "Ordinary rows: messages, prompt/completion, or text."})
    boundary: str | None = field(default=None, metadata={"help": "Benign look-alikes with helpful answers."})


def main() -> None:
    data, args, model = TrlParser((DataArguments, DeRTaSFTConfig, ModelConfig)).parse_args_and_config()
    args.model_init_kwargs = {
        **(args.model_init_kwargs or {}),
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    trainer = DeRTaSFTTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=load_records(data.helpful) if data.helpful else None,
        safety_dataset=load_records(data.safety),
        boundary_dataset=load_records(data.boundary) if data.boundary else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    print(f"Rows: {trainer.row_counts}")
    print(f"RTO target: {trainer.refusal_token.text!r} (id {trainer.refusal_token.id})")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # a rank that leaves while another still saves hangs now and then
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
