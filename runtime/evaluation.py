"""The command line of eval.py: every option with the checks of its value, and the prompts that are typed."""

import argparse
import sys
from collections.abc import Iterator

from runtime.device import choose_device, say_device
from runtime.strict import check_device, check_values


def parse(arguments: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The options. Raises ValueError, naming the option, for a value that makes no sense."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", help="runs, or models (directories, presets or hub repositories)")

    what = parser.add_argument_group("what is scored")
    one = what.add_mutually_exclusive_group(required=True).add_argument
    one("--data", nargs="+", help="named sets (their test split) or files (no default)")
    help = "print the response to this prompt (without TEXT: to each line of standard input) instead of scoring"
    one("--prompt", nargs="?", const=True, metavar="TEXT", help=f"{help}; greedy, unless --seeds are given")
    add = what.add_argument
    add("--limit", type=int, help="only the first LIMIT examples (default: all)")
    add("--task", choices=["rouge", "math", "code"], help="what to score (default: what follows from the data)")
    help = "run generated programs (pass@1) in a sandbox (default: off; sets of programs are then refused)"
    add("--run-code", action="store_true", help=help)

    add = parser.add_argument_group("prompts").add_argument
    help = "chat template: own (the model's; also --chat alone), thinking (own, with thinking on), a path, or none"
    add("--chat", nargs="?", const="own", help=f"{help} (default: as in the model's training here, else none)")
    help = "begin each prompt with what the model's tokenizer puts before a text, such as <s>"
    add("--bos", action=argparse.BooleanOptionalAction, help=f"{help} (default: as in training here, else without)")
    help = "most tokens of the prompt; a longer one is cut (default: half of --max-len)"
    add("--max-prompt-len", type=int, help=help)

    group = parser.add_argument_group("responses")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    help = "sampling seeds; each gives one response per prompt (default: 10 20 30 40 50)"
    either("--seeds", type=int, nargs="+", help=help)
    either("--greedy", action="store_true", help="one greedy response instead of sampling (default: sample)")
    add("--max-len", type=int, help="most tokens of prompt and response together (default: 512; math and code: 1024)")

    add = parser.add_argument_group("how it is computed").add_argument
    add("--batch-size", type=int, default=32, help="prompts per batch (default: %(default)s)")
    add("--device", help="cuda, cuda:1, cpu, ... (default: cuda if there is one that torch can use)")
    help = "dtype of the weights, for responses and cross-entropy (default: %(default)s)"
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help=help)

    options = parser.parse_args(arguments)
    at_least = {"limit": 1, "max_len": 2, "max_prompt_len": 1, "batch_size": 1, "seeds": 0}
    check_values(vars(options), at_least, below={"seeds": 2**32})
    asked, options.device = options.device, options.device or choose_device()[0]
    check_device(options.device)
    say_device(asked, options.device)
    if options.greedy or options.prompt and not options.seeds:
        options.seeds = [None]
    options.seeds = options.seeds or [10, 20, 30, 40, 50]
    return options


def read_lines() -> Iterator[str]:
    """The lines of standard input that are not blank; on a terminal, with a prompt for each."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line
