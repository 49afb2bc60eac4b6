"""The papers' published settings for their models and tasks, and the first stage, which fine-tunes the teacher."""

import shlex
import sys
from pathlib import Path

from runtime import parallel
from runtime.hub import MODELS
from runtime.options import Options

_TEACHER = {"data": "dolly", "epochs": 10, "batch_size": 32, "lr": 2e-5}  # fine-tuned as a whole
_LORA = {**_TEACHER, "lr": 1e-3, "lora": 256, "lora_alpha": 8.0, "lora_dropout": 0.1}
RECIPES = {  # {model that is trained (by any method), or task: its settings}; all other options keep their defaults
    "gpt2": {"data": "dolly", "epochs": 20, "batch_size": 32, "lr": 5e-4},
    "tinyllama": _LORA,
    "qwen": _TEACHER,
    "llama2": _LORA,
    "mistral": _LORA,
    "math": {"epochs": 3, "batch_size": 128, "lr": 1e-5, "projector_lr": 1e-3, "temperature": 1.0},
    "code": {"epochs": 1, "batch_size": 128, "lr": 1e-5, "projector_lr": 1e-3, "temperature": 1.0},
}
TEACHER_STAGE = (  # options that also apply to the teacher; all others are about the student and how it learns
    "data valid bos keep_best max_steps batch_size grad_accum bucket tokens_per_batch max_len max_prompt_len chunk "
    "recompute seed dtype device compile checkpoint_every log_every tensorboard"
).split()


def recipe_name(given: dict) -> str:
    """Which of RECIPES applies to the given options: --task, else the student's preset; "" if none does."""
    student = given.get("student", "")
    preset = next((name for name in MODELS if student in (name, MODELS[name])), "")
    name = given.get("task", "" if Path(student).is_dir() or given.get("from_scratch") else preset)
    without_lora = given.get("lora") == 0 and "lora" in RECIPES.get(name, {})  # then its other settings do not apply
    return name if name in RECIPES and not without_lora else ""


def divided(recipe: dict) -> dict:
    """A recipe with its batch size divided by the number of processes."""
    return recipe and {**recipe, "batch_size": max(1, recipe["batch_size"] // parallel.world())}


def settings(given: dict) -> dict:
    """The given options, completed by the recipe that applies to them; without --task and --teacher-sft."""
    options = {name: value for name, value in given.items() if name not in ("task", "teacher_sft")}
    return {**divided(RECIPES.get(recipe_name(given), {})), **options}


def shorten(options: dict) -> dict:
    """The options of a run that its command line must give. Defaults are left out, unless the student is a preset whose
    recipe would replace them."""
    recipe = RECIPES.get(recipe_name({name: options[name] for name in ("student", "from_scratch")}), {})
    given = {name: value for name, value in options.items() if value != getattr(Options, name) or name in recipe}
    return {name: value for name, value in given.items() if value is not None}


def flags(options: dict) -> str:
    """The options as part of a command line."""
    words = []
    for name, value in options.items():
        flag = ("--no-" if value is False else "--") + name.replace("_", "-")
        values = [] if isinstance(value, bool) else value if isinstance(value, list) else [value]
        words += [flag, *(shlex.quote(str(part)) for part in values)]
    return " ".join(words)


def say_settings(given: dict) -> None:
    """One line on standard error: which settings come from the papers' recipe, and which were given instead."""
    name = recipe_name(given)
    recipe = divided(RECIPES.get(name, {}))
    taken = flags({option: value for option, value in recipe.items() if given.get(option, value) == value})
    instead = flags({option: given[option] for option, value in recipe.items() if given.get(option, value) != value})
    line = f"{taken or 'none'} from the papers' for {name}" if name else f"none are published for {given['student']}"
    line += f", replaced by the command line: {instead}" if instead else ""
    rest = "all others" if taken else "all"
    print(f"settings: {line}; {rest} as given, else the defaults", file=sys.stderr)


def teacher_stage(given: dict, out: str) -> dict:
    """The options of the stage that fine-tunes the teacher before the distillation."""
    stage = {"method": "sft", "student": given["teacher"]}
    if given.get("teacher_chat"):
        stage["student_chat"] = given["teacher_chat"]
    stage |= {name: given[name] for name in TEACHER_STAGE if name in given}
    if given.get("shard") in ("teacher", "both"):  # in this stage the teacher is the student
        stage["shard"] = "student"
    return {**divided(RECIPES.get(recipe_name(stage), _TEACHER)), **stage, "out": f"{out}/teacher"}


def say_teacher(given: dict, o: Options, directory: Path, run: dict | None) -> None:
    """On standard error: which checkpoint the teacher is and what is known of its training; if it was not trained on
    this data, the command that does so. run: the options of the run that trained it, if it was trained here."""
    if run:
        line = f"teacher: {directory}, trained here: --method {run.get('method')} on --data {run.get('data')}"
        same = Path(run.get("data", "")).resolve() == Path(o.data).resolve()
        print(line + ("" if same else f"; this run is on --data {o.data}"), file=sys.stderr)
        return
    published = not Path(o.teacher).is_dir()  # from the hub, by the name of a preset or a repository
    known = f"as published in {MODELS.get(o.teacher, o.teacher)}" if published else "not trained here (no args.json)"
    which = "it has not been" if published else "it may not have been"
    print(
        f"teacher: {directory}, {known}; {which} fine-tuned on --data {o.data}. The papers do that first:\n"
        f"    {parallel.launcher()} train.py {flags(teacher_stage(given, o.out))}\n"
        f"and then --teacher {shlex.quote(f'{o.out}/teacher/student')}; --teacher-sft does both",
        file=sys.stderr,
    )
