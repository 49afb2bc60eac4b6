"""The embedded tiny task: a generated English instruction data set, and the two tokenizers that go with it.

Why the task is open-ended. Distillation pays where the teacher knows more than the labels say. On a deterministic task
(reverse a word, add two numbers) a good teacher is nearly one-hot on the gold token: it repeats the label and only
halves its weight. Here most prompts have hundreds of equally proper answers, and the gold answer is *one random draw*
from a small slot grammar in which every word has tastes of its own: a fox mostly sniffs the flowers, sometimes dances
and never hides, a wolf does. A teacher that reads 16,000 draws learns those conditional distributions; the 500 single
draws of the student do not show them, but the teacher's soft predictions do. Test prompts combine words that training
only shows apart.

The grammar is fixed: the tastes of a word are seeded by the word itself, so that all data seeds share one language.
"""

import json
import random
import re
import shutil
import statistics
from dataclasses import asdict, replace
from functools import cache
from itertools import product, zip_longest
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import train
from data import Example
from eval import respond, score
from model import load_model
from runtime.formats import read_examples
from runtime.run import TOKENIZER_FILES, finished_runs, tokenizer_of, write_text
from runtime.strict import choose_alignment
from runtime.tokenizer import TextTokenizer, read_tokenizer
from scores.tables import table

# ----------------------------------------------------------------------------------------------------------------------
# The words. A group has its words and, for every property, the pool in which each word has favourites of its own.

# fmt: off
GROUPS = {
    "animal": {
        "words": "fox, owl, otter, hedgehog, mouse, wolf, goose, rabbit, bear, duck, frog, squirrel, badger, turtle, "
        "pony, sheep",
        "look": "sleepy, shy, clever, hungry, muddy, proud, fluffy, curious, grumpy, gentle, noisy, spotted",
        "do": "nap, hide, dance, sing, hum softly, dig for treasure, chase butterflies, count the clouds, sniff the "
        "flowers, wait for supper, watch the rain, roll around",
        "feature": "bright eyes, a round belly, muddy feet, a crooked smile, a tiny scarf, soft cheeks, a lucky spot, "
        "a leaf on its head, jam on its chin, a worried face",
    },
    "person": {
        "words": "baker, sailor, teacher, gardener, painter, queen, wizard, farmer, pirate, doctor, child, thief, "
        "fisherman, dentist",
        "look": "cheerful, tired, brave, careless, famous, lonely, patient, polite, clumsy, stubborn, dreamy, wise",
        "do": "read old letters, whistle a tune, drink hot tea, tell long jokes, search for a key, sketch strangers, "
        "write poems, argue with pigeons, practise the violin, polish the silver, fall asleep, juggle lemons",
        "feature": "a torn coat, silver buttons, ink on both hands, a feathered hat, enormous boots, flour "
        "everywhere, a secret smile, messy hair, a borrowed umbrella, odd socks",
        "greet": "good morning, hush now, bless you, come closer, watch out, never mind, well done, good night, at "
        "last, excuse me",
        "ask": "have some of my soup, stop eating my hat, please mind the step, let us go home, the tide is rising, "
        "sing that song again, tell nobody about this, lend me your blanket, I forgot your name, dinner is burning",
    },
    "thing": {
        "words": "robot, kite, clock, piano, kettle, lantern, umbrella, wagon, bicycle, puppet, shelf, broom",
        "look": "rusty, shiny, wooden, broken, heavy, dusty, painted, crooked, antique, precious, forgotten, polished",
        "do": "creak, rattle, gleam, gather dust, glow, lean to one side, tip over, buzz, spin slowly, wobble, "
        "frighten the cat, confuse the visitors",
        "feature": "a missing screw, golden edges, a faded label, three scratches, a loose handle, a red ribbon, a "
        "spider inside, strange markings, a price tag, green spots",
    },
    "outdoor": {
        "words": "garden, harbour, market, forest, meadow, orchard, village, beach, park, vineyard",
        "spot": "by the gate, under the oak, behind the hedge, beside the well, on a wobbly bench, between two "
        "baskets, near the bridge, in the tall grass, next to the fountain, on the stone wall, under the stars, along "
        "the path",
    },
    "indoor": {
        "words": "kitchen, library, castle, attic, bakery, museum, lighthouse, school, theatre, barn, palace, "
        "workshop",
        "spot": "under the stairs, behind the door, near the window, next to the stove, in the far corner, on the top "
        "step, behind the curtain, under the table, beside the ladder, on the carpet, between the barrels, inside a "
        "cupboard",
    },
    "time": {
        "words": "at dawn, at midnight, on Monday, after supper, in spring, during a storm, on holiday, before "
        "school, in the snow, on a train, by moonlight, after a bath",
        "why": "nobody is watching, the air smells sweet, it is good luck, the radio is broken, there is time to "
        "spare, that keeps everyone warm, the moon says so, it costs nothing, old habits are strong, sleep is "
        "impossible",
    },
    "country": {
        "words": "France, Spain, Italy, Japan, Egypt, Norway, Greece, Poland, Peru, Kenya, Cuba, Austria",
        "sight": "the old bridge, the clock tower, the night market, the opera, the royal gardens, the fish hall, the "
        "puppet theatre, the river boats, the library, the toy museum, the city walls, the tram depot",
        "treat": "eat a pancake, buy a postcard, ride a donkey, feed the swans, learn a waltz, try the soup, climb a "
        "hill, meet the mayor, lose a glove, send a letter",
    },
}
SHARED = {  # pools of more than one group
    "friend": "a good friend, two ducks, the neighbours, a small dragon, an old spoon, three mice, a paper boat, the "
    "mayor, a brass band, nobody else",
    "own": "a blue teapot, a jar of buttons, two left boots, a map, a silver whistle, some string, a ripe pear, a "
    "love letter, seven candles, a wool blanket, a box of nails, a spare hat",
    "when": "at sunset, after lunch, on rainy days, before breakfast, every Sunday, in winter, when the bells ring, "
    "while others sleep, in the evening, once a year, at noon, during concerts",
    "hold": "a ladder, an empty cage, some chalk, a bucket of sand, a drum, old newspapers, a mirror, ten corks, a "
    "sleeping cat, a telescope, wet towels, a cake tin",
}

# Words whose options are all their own. The first two tables double as groups of words for prompts.
MEMBERS = {
    "fruit": "pear, plum, cherry, lemon, melon", "tree": "birch, pine, willow, maple, cedar",
    "flower": "rose, tulip, daisy, lily, poppy", "bird": "robin, swan, parrot, heron, raven",
    "tool": "hammer, saw, shovel, chisel, rake", "instrument": "flute, harp, trumpet, cello, banjo",
    "hat": "bonnet, beret, turban, helmet, crown", "vegetable": "carrot, turnip, pumpkin, leek, radish",
    "boat": "canoe, ferry, raft, tugboat, yacht", "dance": "polka, tango, waltz, jig, samba",
    "cake": "muffin, brownie, doughnut, waffle, tart", "jewel": "ruby, pearl, diamond, sapphire, garnet",
}
OPPOSITES = {
    "cold": "hot, warm, mild, cosy, heated", "loud": "quiet, silent, peaceful, calm, hushed",
    "dark": "bright, sunny, light, sparkling, radiant", "empty": "full, crowded, packed, busy, lively",
    "dirty": "clean, spotless, tidy, neat, swept", "dangerous": "safe, harmless, secure, friendly, protected",
    "boring": "exciting, thrilling, amusing, fun, fascinating", "huge": "small, little, tiny, cramped, modest",
    "ugly": "pretty, lovely, beautiful, charming, elegant", "modern": "old, ancient, historic, dated, traditional",
}
CAPITALS = dict(France="Paris", Spain="Madrid", Italy="Rome", Japan="Tokyo", Egypt="Cairo", Norway="Oslo",
                Greece="Athens", Poland="Warsaw", Peru="Lima", Kenya="Nairobi", Cuba="Havana", Austria="Vienna")
PLURALS = dict(mouse="mice", wolf="wolves", goose="geese", sheep="sheep", child="children", thief="thieves",
               fisherman="fishermen", shelf="shelves", pony="ponies", fox="foxes")

# family: (prompt, answers). {noun} is the prompt's own word, {noun.look} one of that word's favourite looks.
FAMILIES = {
    "sentence": ("Write a sentence about a {noun} in the {place}.",
        ["The {noun.look} {noun} {noun.does} {place.spot} {place.when}.",
         "{place.when}, the {noun.look} {noun} {noun.does} {place.spot}."]),
    "look": ("How does the {noun} in the {place} look?",
        ["The {noun} looks {noun.look} {place.when}, with {noun.feature}.",
         "Rather {noun.look}, with {noun.feature}, especially {place.when}."]),
    "find": ("Where in the {place} can I find the {noun}?",
        ["Look {place.spot}, where the {noun} {noun.does} {place.when}.",
         "The {noun.look} {noun} is usually {place.spot} {place.when}."]),
    "do": ("What does a {noun} do {time}?",
        ["The {noun} {noun.does} with {noun.friend}, because {time.why}.",
         "{time}, since {time.why}, the {noun.look} {noun} {noun.does}."]),
    "list": ("List three things that the {noun} keeps in the {place}.",
        ["The {noun.look} {noun} keeps {noun.own}, {place.hold} and {noun.friend}.",
         "{place.hold}, {noun.own} and, {place.spot}, {noun.friend}."]),
    "kind": ("Name a kind of {kind} for the {noun}.",
        ["A {kind.member} is the right {kind} for the {noun.look} {noun}.",
         "A {kind.member}, as long as the {noun} {noun.does}."]),
    "capital": ("What should a {noun} do in the capital of {country}?",
        ["In {country.capital} the {noun} should see {country.sight} and {country.treat}.",
         "Visit {country.sight} in {country.capital}, and {country.treat} with {noun.friend}."]),
    "plural": ("Use the plural of {noun} in a sentence about the {place}.",
        ["Two {noun.look} {noun.plural} {noun.do} {place.spot}.",
         "{place.when}, the {noun.plural} {noun.do} {place.spot}."]),
    "opposite": ("Say the opposite: the {place} is {quality}.",
        ["The {place} is {quality.opposite} {place.when}, with {place.hold} {place.spot}.",
         "Even {place.spot}, the {place} is {quality.opposite} {place.when}."]),
    "story": ("Begin a story about a {person} and the {animal}.",
        ["Once the {person.look} {person} gave {person.own} to the {animal.look} {animal}.",
         "Nobody knew why the {animal.look} {animal} followed the {person} with {person.feature}."]),
    "say": ("What does the {person} say to the {animal}?",
        ["{person.greet}, my {animal.look} {animal}, {person.ask}!",
         "{person.greet}, says the {person.look} {person}, {person.ask}!"]),
}
# fmt: on

FIELDS = {  # the groups that a {field} of a prompt runs through
    "noun": ("animal", "person", "thing"),
    "place": ("outdoor", "indoor"),
    **{name: (name,) for name in ("animal", "person", "time", "country")},
}
FIELDS = {field: ", ".join(GROUPS[name]["words"] for name in names).split(", ") for field, names in FIELDS.items()}
FIELDS |= {"kind": list(MEMBERS), "quality": list(OPPOSITES)}
POOLS = {word: group | SHARED for group in GROUPS.values() for word in group["words"].split(", ")}
POOLS |= {word: {"member": pool} for word, pool in MEMBERS.items()}
POOLS |= {word: {"opposite": pool} for word, pool in OPPOSITES.items()}

WEIGHTS = (6, 4, 3, 2, 1)  # a word's taste in its five favourites of a pool; the other options it never takes
MARKER = "\n"  # ends every prompt: prompt and answer are tokenised apart, the answer starts without a space


# ----------------------------------------------------------------------------------------------------------------------
# The grammar.


@cache
def favourites(word: str, name: str, tasted: bool = True) -> tuple[tuple[str, int], ...]:
    """The options of one property of a word with their weights: (("shy", 6), ("muddy", 4), ...) for ("fox", "look").
    Not `tasted`: every option of the pool, each as likely."""
    if name == "plural":
        return ((PLURALS.get(word, word + "s"), 1),)
    if name == "capital":
        return ((CAPITALS[word], 1),)
    if name == "does":  # the same taste as "do"
        return tuple((in_third_person(option), weight) for option, weight in favourites(word, "do", tasted))
    pool = POOLS[word][name].split(", ")
    if not tasted:
        return tuple((option, 1) for option in pool)
    # Seeding with a string does not depend on the process, and random() is the one method that Python promises to keep.
    taste = random.Random(f"taste of {word} in {name}")
    return tuple(zip(sorted(pool, key=lambda _: taste.random()), WEIGHTS, strict=False))


def in_third_person(phrase: str) -> str:
    verb, space, rest = phrase.partition(" ")
    if verb.endswith(("s", "sh", "ch", "x", "z")):
        return verb + "es" + space + rest
    return (verb[:-1] + "ies" if re.search("[^aeiou]y$", verb) else verb + "s") + space + rest


@cache
def all_prompts() -> dict[str, tuple[str, dict[str, str]]]:
    """Every prompt of the task, in a fixed order: prompt -> (family, the words it was filled with)."""
    prompts = {}
    for family, (template, _) in FAMILIES.items():
        fields = re.findall(r"\{(\w+)\}", template)
        for words in product(*(FIELDS[field] for field in fields)):
            filled = dict(zip(fields, words, strict=True))
            prompts[re.sub(r"\ba (?=[aeiou])", "an ", template.format(**filled)) + MARKER] = (family, filled)
    return prompts


@cache
def answer_slots(prompt: str, tasted: bool = True) -> tuple[tuple[tuple[tuple[str, int], ...], ...], ...]:
    """The grammar of a prompt's answers: two equally likely forms, each a sequence of slots, each slot a tuple of
    (option, weight); plain text is a slot with one option."""
    family, words = all_prompts()[prompt]
    forms = []
    for template in FAMILIES[family][1]:
        slots = []
        for piece in filter(None, re.split(r"(\{[^}]+\})", template)):
            field, _, name = piece.strip("{}").partition(".")
            text = words[field] if piece.startswith("{") else piece
            slots.append(favourites(text, name, tasted) if name else ((text, 1),))
        slots[0] = tuple((option[0].upper() + option[1:], weight) for option, weight in slots[0])
        forms.append(tuple(slots))
    return tuple(forms)


def draw_answer(prompt: str, generator: random.Random) -> str:
    """One random answer: a form, then every slot by its word's taste."""
    slots = generator.choice(answer_slots(prompt))
    return "".join(generator.choices(*zip(*slot, strict=True))[0] for slot in slots)


@cache
def answer_pattern(prompt: str) -> re.Pattern:
    """Of all answers that are possible."""
    forms = [[[re.escape(option) for option, _ in slot] for slot in form] for form in answer_slots(prompt)]
    return re.compile("|".join("".join(f"(?:{'|'.join(slot)})" for slot in form) for form in forms))


def is_valid(prompt: str, answer: str) -> bool:
    """Whether the whole answer, from its capital letter to its full stop, is possible under the prompt's grammar."""
    return answer_pattern(prompt).fullmatch(answer) is not None


def score_answers(model, tokenizer: TextTokenizer, examples: list[Example], spelt=str) -> dict[str, float]:
    """{valid, rouge_l, exact_match} of greedy answers, in per cent. `valid`: what the grammar allows, of the texts as
    `spelt` spells them."""
    answers = respond(model, tokenizer, [example.prompt for example in examples], max_new_tokens=48, batch_size=100)
    valid = [is_valid(spelt(e.prompt), spelt(answer)) for e, answer in zip(examples, answers, strict=True)]
    return {"valid": 100 * statistics.fmean(valid), **score(answers, examples)}


# ----------------------------------------------------------------------------------------------------------------------
# The data set.


def make_data(
    seed: int = 0, teacher_train: int = 16000, student_train: int = 500, valid: int = 200, test: int = 300
) -> dict[str, list[dict]]:
    """The four parts of the data set, each a list of {"prompt", "output"}.

    The seed parts the prompts of every family once: 10% for validation, 15% for the test, the rest for training.
    teacher_train and student_train are single draws for random training prompts, every family equally often (a prompt
    may come back with another answer); valid and test have distinct prompts, evenly over the families, each with five
    reference draws as "output". A part does not change with the size of another. Raises ValueError where valid or test
    ask for more prompts than exist.
    """
    groups = {"train": [], "valid": [], "test": []}
    for family in FAMILIES:
        prompts = [prompt for prompt, (its_family, _) in all_prompts().items() if its_family == family]
        random.Random(f"{seed} split {family}").shuffle(prompts)
        first, second = len(prompts) // 10, len(prompts) // 4
        groups["valid"].append(prompts[:first])
        groups["test"].append(prompts[first:second])
        groups["train"].append(prompts[second:])

    data = {}
    for name, size in (("teacher_train", teacher_train), ("student_train", student_train)):
        generator = random.Random(f"{seed} {name}")
        prompts = (generator.choice(generator.choice(groups["train"])) for _ in range(size))
        data[name] = [{"prompt": prompt, "output": draw_answer(prompt, generator)} for prompt in prompts]
    for name, size in (("valid", valid), ("test", test)):
        generator = random.Random(f"{seed} {name}")
        # one prompt of each family in turn, as long as the family has any
        in_turn = [prompt for turn in zip_longest(*groups[name]) for prompt in turn if prompt is not None]
        if size > len(in_turn):
            raise ValueError(f"{name}={size}, but the tiny task has only {len(in_turn)} {name} prompts; ask for fewer")
        chosen = in_turn[:size]
        generator.shuffle(chosen)
        data[name] = [{"prompt": p, "output": [draw_answer(p, generator) for _ in range(5)]} for p in chosen]
    return data


def write_jsonl(file: Path, examples: list[dict]) -> None:
    file.write_text("".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizers: two kinds that share no convention, as a Llama teacher and a GPT-2 student do.


TEACHER_VOCABULARY, STUDENT_VOCABULARY = 1000, 900


def train_tokenizers(
    texts: list[str],
    teacher_directory: str | Path,
    student_directory: str | Path,
    student_vocabulary: int = STUDENT_VOCABULARY,
) -> None:
    """Train both tokenizers on the texts and write tokenizer.json and tokenizer_config.json into the two directories.

    Give prompts and outputs as separate texts, since that is how they are tokenised. Same texts, same files.
    Teacher: SentencePiece-style BPE as Llama's ("▁" for a space and before the text, 256 byte tokens to fall back on).
    Student: byte-level BPE as GPT-2's.
    """
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    teacher = train_sentencepiece_style(texts, TEACHER_VOCABULARY, list(special.values()))
    save_tokenizer(teacher, teacher_directory, {"add_bos_token": True, "add_eos_token": False, **special})
    student = train_byte_level(texts, student_vocabulary, "<|endoftext|>")
    save_tokenizer(student, student_directory, dict.fromkeys(special, "<|endoftext|>"))


def train_sentencepiece_style(texts: list[str], size: int, special: list[str]) -> Tokenizer:
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizer
    # Only learning needs the cut into words: merges learned inside words never join two words later.
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\w+|▁?[^\w▁]|▁"), "isolated")
    size -= len(byte_tokens) + len(special)
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    # The byte tokens join afterwards, because the trainer would make them special and then find "<0x41>" in plain text.
    pieces = special + byte_tokens + sorted(learned["vocab"], key=learned["vocab"].get)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=special[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def train_byte_level(texts: list[str], size: int, end_of_text: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[end_of_text], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path, config: dict) -> None:
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# The stages: teacher, the student's supervised twin, the distilled student, scores.

ROOT = "runs/tiny"
TEACHER = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": TEACHER_VOCABULARY,
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 384, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
STUDENT = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": STUDENT_VOCABULARY, "n_embd": 128,
    "n_layer": 2, "n_head": 4, "n_positions": 128, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.02, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
DEFAULTS = {  # of options; what is not named here is as on the command line
    "lr": 3e-3, "projector_lr": 1e-2, "max_len": 96, "max_prompt_len": 48, "weight_decay": 0.1, "warmup": 20,
    "chunk": 4096, "log_every": 20, "from_scratch": True, "seed": 0,
}  # fmt: skip
DISTILLATION = (  # options that say nothing about supervised fine-tuning
    "teacher teacher_chat recipe align divergence kd_rate temperature on_policy on_policy_after seqkd_temperature "
    "projectors projector_lr cache_teacher"
).split()
TEACHER_STAGE = {"max_steps": 800, "batch_size": 64}
STUDENT_STAGE = {"max_steps": 600, "batch_size": 32}


def find(role: str) -> Path:
    """The file or directory that the name "tiny" stands for as a student, teacher or data."""
    path = Path(ROOT) / {"student": "start/student", "teacher": "teacher/student", "data": "student_train.jsonl"}[role]
    if not path.exists():
        raise FileNotFoundError(f"{role} 'tiny': {path} is not there yet; `python train.py` makes it")
    return path


def run(given: dict) -> None:
    """`python train.py` without a model: teacher, supervised twin and distilled student (same start, same batches),
    then their scores on the test split. Finished stages in the directory are kept and reused.

    given: the options that were given on the command line.
    """
    if "epochs" in given:
        raise ValueError("--epochs: the embedded task counts updates; use --max-steps")
    o = train.Options(**{**DEFAULTS, "out": ROOT, **given})
    train.check_options(replace(o, student="tiny", teacher="tiny", data="tiny"))  # before anything is made
    root, start = Path(o.out), Path(o.out) / "start"
    prepare(root, o.seed)
    if o.method not in ("sft", "seqkd"):  # a combination that cannot be is told before the teacher is trained
        tokenizers = read_tokenizer(start / "teacher"), read_tokenizer(start / "student")
        choose_alignment(o.align, o.method, o.recipe, *tokenizers)

    def stage(name: str, **changes) -> float:
        options = {**asdict(o), "out": str(root / name), "checkpoint_every": 10**6, **changes}
        options |= {key: given[key] for key in ("max_steps", "batch_size", "checkpoint_every") if key in given}
        if options["method"] == "sft":  # one teacher and one twin serve every way to distil
            options = {key: value for key, value in options.items() if key not in DISTILLATION}
        return train.run_stage(train.Options(**options), f"{name} {stages.index(name) + 1}/{len(stages)}")

    taught = {"data": str(root / "teacher_train.jsonl"), "student": str(start / "teacher"), **TEACHER_STAGE}
    learned = {"data": str(root / "student_train.jsonl"), "student": str(start / "student"), **STUDENT_STAGE}
    recipe = [o.recipe] if o.method == "dskd" else []
    words = [o.method, *recipe, *(given[key] for key in ("align", "divergence") if key in given)]
    distilled = "-".join([*words, "on-policy"] if o.on_policy else words)
    stages = list(dict.fromkeys(["teacher", "sft", distilled]))
    seconds = {"teacher": stage("teacher", method="sft", **taught), "sft": stage("sft", method="sft", **learned)}
    if o.method != "sft":
        seconds[distilled] = stage(distilled, teacher=str(root / "teacher" / "student"), **learned)
    seconds |= finished_runs(root)  # also those of earlier calls
    rows = [["", "parameters", "valid answers", "Rouge-L", "training"]]
    examples = read_examples(root / "test.jsonl")
    for name in seconds:
        directory = root / name / "student"
        model = load_model(directory, device=o.device or "cpu")
        scores = {"examples": len(examples), "parameters": sum(p.numel() for p in model.parameters()),
                  **score_answers(model, tokenizer_of(directory), examples)}  # fmt: skip
        write_text(root / name / "scores.json", json.dumps(scores, indent=1) + "\n")
        figures = f"{scores['parameters'] / 1e6:.2f} M", f"{scores['valid']:.1f} %", f"{scores['rouge_l']:.1f}"
        rows.append([name, *figures, f"{seconds[name]:.0f} s"])
    print(f"\n{len(examples)} test prompts, greedy answers; seed {o.seed}; everything is in {root}\n")
    print(table(rows))


def prepare(root: Path, seed: int) -> None:
    """The data as JSONL files, both tokenizers, and a config.json for each model, in `root`; kept if they are there."""
    if (root / "prepared.json").is_file():
        made = json.loads((root / "prepared.json").read_text())["seed"]
        if made != seed:
            raise ValueError(f"--seed {seed}: {root} was made with --seed {made}; give another --out")
        return
    data = make_data(seed)
    root.mkdir(parents=True, exist_ok=True)
    for name, examples in data.items():
        write_jsonl(root / f"{name}.jsonl", examples)
    texts = [text for example in data["teacher_train"] for text in (example["prompt"], example["output"])]
    train_tokenizers(texts, root / "start" / "teacher", root / "start" / "student")
    for name, config in (("teacher", TEACHER), ("student", STUDENT)):
        (root / "start" / name / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_text(root / "prepared.json", json.dumps({"seed": seed}) + "\n")


def write_untrained(directory: Path, tokenizer: Path, config: dict) -> Path:
    """A model's directory without weights: the tokenizer's files, and config.json for its vocabulary."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, directory / name)
    read = read_tokenizer(directory)
    config = {**config, "vocab_size": read.size, "bos_token_id": read.eos_id, "eos_token_id": read.eos_id}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return directory
