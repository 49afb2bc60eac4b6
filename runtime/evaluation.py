"""The command line of eval.py: every option, and what makes no sense."""

import argparse

import torch

from runtime.strict import check_device, check_values


def parse(arguments: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The options. Raises ValueError naming one whose value makes no sense."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", help="runs or model directories")

    add = parser.add_argument_group("what is scored").add_argument
    add("--data", required=True, nargs="+", help="named sets (their test split) or files (no default)")
    add("--limit", type=int, help="only the first LIMIT examples (default: all)")
    add("--task", choices=["rouge", "math", "code"], help="what to score (default: what follows from the data)")
    help = "run generated programs (pass@1), in a sandbox (default: no, so that sets of programs are refused)"
    add("--run-code", action="store_true", help=help)

    add = parser.add_argument_group("prompts").add_argument
    help = "chat template of prompts: own (the model's; --chat alone), thinking (own, with thinking), a path, or none"
    add("--chat", nargs="?", const="own", help=f"{help} (default: as a run was trained, else none)")
    help = "begin prompts as the model's tokenizer begins a text (default: as a run was trained, else not)"
    add("--bos", action=argparse.BooleanOptionalAction, help=help)
    help = "tokens of the prompt; a longer one is cut (default: half of --max-len)"
    add("--max-prompt-len", type=int, help=help)

    add = parser.add_argument_group("responses").add_argument
    help = "sampling seeds, a response to each prompt with every one (default: 10 20 30 40 50)"
    add("--seeds", type=int, nargs="+", default=[10, 20, 30, 40, 50], help=help)
    add("--greedy", action="store_true", help="one greedy response instead of sampling (default: sample)")
    add("--max-len", type=int, help="tokens of prompt and response (default: 512, math and code 1024)")

    add = parser.add_argument_group("how it is computed").add_argument
    add("--batch-size", type=int, default=32, help="prompts at a time (default: %(default)s)")
    help = "cuda, cuda:1, cpu, ... (default: cuda if there is one, here %(default)s)"
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help=help)
    help = "of the weights while generating (default: %(default)s)"
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help=help)

    options = parser.parse_args(arguments)
    at_least = {"limit": 1, "max_len": 2, "max_prompt_len": 1, "batch_size": 1, "seeds": 0}
    check_values(vars(options), at_least, below={"seeds": 2**32})
    check_device(options.device)
    return options
