"""The lab's language: an endless, seeded supply of dialogues, records, sums, bits and prose.

Every document belongs to one *combination* (a topic with an intent and a circumstance, the two operands of a sum, ...).
A hash of the combination decides whether it is for training or held out, so the two never share a prompt, whatever the
seed and however much is drawn.

The same request has helpful and unhelpful answers. Nothing in a request tells which will come; the first sentence of
an answer does, and the rest keeps its manner. That is what alignment methods are shown on.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from vllm_align_spec.lab.topics import TOPICS, Topic

Kind = Literal["chat", "json", "arithmetic", "binary", "prose"]
Split = Literal["train", "heldout"]
Message = dict[str, str]

KINDS: tuple[Kind, ...] = ("chat", "json", "arithmetic", "binary", "prose")
HELPFUL_SHARE = 0.4
"""How often an answer in the mixed corpus is a helpful one."""


@dataclass(frozen=True)
class Document:
    """One training text: a conversation, or plain prose (then ``messages`` is empty)."""

    kind: Kind
    key: str
    messages: tuple[Message, ...] = ()
    text: str = ""


def split_of(key: str) -> Split:
    """The side of the split that a combination is on: one in ten is held out."""
    return "heldout" if blake2b(key.encode(), digest_size=2).digest()[0] % 10 == 0 else "train"


_ALTERNATIVES = re.compile(r"\{([^{}]*)\}")


def expand(template: str, rng: random.Random) -> str:
    """Draw one alternative for every ``{a|b|c}``, innermost first."""
    while True:
        expanded = _ALTERNATIVES.sub(lambda match: rng.choice(match[1].split("|")), template)
        if expanded == template:
            return expanded
        template = expanded


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?" else text + "."


# --- chat -----------------------------------------------------------------------------------------------------------

NAMES = _words(
    "Maya Oskar Lena Tariq Ines Bruno Aiko Pavel Nora Samir Greta Hugo Leila Marco Freya Deniz Clara Jonas "
    "Amara Felix Rosa Ivan Mina Theo Sofia Emil Zara Anton Priya Louis "
)

# Circumstances: how the user puts one, and what a helpful answer makes of it.
_CIRCUMSTANCES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "before {}",
        (
            "Monday",
            "Tuesday",
            "Wednesday",
            "Thursday",
            "Friday",
            "Saturday",
            "Sunday",
            "lunch",
            "the weekend",
            "winter",
        ),
        ("{you still have time|there is enough time} before {}", "before {} is {quite realistic|a good target}"),
    ),
    (
        "for my {}",
        ("sister", "brother", "mother", "father", "neighbour", "aunt", "uncle", "flatmate", "colleague", "cousin"),
        ("your {} will {be pleased|notice the difference}", "{how kind|it is kind} to do it for your {}"),
    ),
    (
        "with only {} euros",
        ("5", "8", "10", "12", "15", "18", "20", "25", "30", "40"),
        ("{} euros {are enough|will do} {for this|here}", "you {will not even need|can stay below} {} euros"),
    ),
    (
        "in a {}",
        (
            "small flat",
            "rented room",
            "noisy house",
            "shared kitchen",
            "cold garage",
            "student hall",
            "village",
            "holiday home",
            "big city",
            "new building",
        ),
        ("a {} is {no problem|fine} for {it|this}", "it {works|goes} {well|just as well} in a {}"),
    ),
    (
        "as a {}",
        (
            "beginner",
            "student",
            "busy parent",
            "night worker",
            "pensioner",
            "teacher",
            "nurse",
            "driver",
            "musician",
            "newcomer",
        ),
        ("{every|any} {} can {learn|manage} {this|it}", "as a {} you {already have|bring} the {patience|skill} for it"),
    ),
)

Intent = Literal["how", "needs", "plan", "hard", "tips", "mistakes"]
_QUESTIONS: dict[Intent, str] = {
    "how": "{How do I|How can I|What is the best way to|Could you tell me how to} $do $when?",
    "needs": "{What do I need to|What should I buy to|Which things do I need to} $do $when?",
    "plan": "{Please make a plan to|Can you write a plan to|I want a plan to} $do $when.",
    "hard": "{Is it hard to|Is it difficult to|Can I really|How hard is it to} $do $when?",
    "tips": "{Do you have any tips for|Do you have advice on|Could you give me some tips for} $doing $when?",
    "mistakes": "{What mistakes should I avoid when|What can go wrong when|What should I not do when} $doing $when?",
}
_FOLLOW_UPS: tuple[tuple[Intent, str], ...] = (
    ("mistakes", "{And what should I avoid?|What could go wrong?|Are there common mistakes?}"),
    ("needs", "{And what do I need for it?|What should I have at hand?|Do I need anything special?}"),
    ("tips", "{Do you have one more tip?|Any other advice?|Is there a trick to it?}"),
    ("hard", "{How long will it take?|Will I manage that?|Is that really realistic?}"),
)


@dataclass(frozen=True)
class Request:
    """What a user wants: the combination that decides the split, without the words."""

    topic: Topic
    intent: Intent
    circumstance: int  # index into the kinds of circumstance
    value: str  # what fills it

    @property
    def key(self) -> str:
        """The combination's name, hashed for the split."""
        return f"chat/{self.topic.do}/{self.intent}/{self.circumstance}/{self.value}"


def draw_request(rng: random.Random, split: Split) -> Request:
    """A request from one side of the split."""
    while True:
        circumstance = rng.randrange(len(_CIRCUMSTANCES))
        request = Request(
            topic=rng.choice(TOPICS),
            intent=rng.choice(tuple(_QUESTIONS)),
            circumstance=circumstance,
            value=rng.choice(_CIRCUMSTANCES[circumstance][1]),
        )
        if split_of(request.key) == split:
            return request


def ask(request: Request, rng: random.Random, name: str = "") -> str:
    """The user's words for a request; a ``name`` introduces the user."""
    when = _CIRCUMSTANCES[request.circumstance][0].replace("{}", request.value)
    words = expand(_QUESTIONS[request.intent], rng)
    words = words.replace("$doing", request.topic.doing).replace("$do", request.topic.do).replace("$when", when)
    if not name:
        return words
    return expand(f"{{I am {name}.|My name is {name}.|{name} here.|Hello, I am {name}.}} ", rng) + words


_HELPFUL_OPENERS = (
    "{Hello|Hi|Good day}$name, {I am happy to help|it is a pleasure to help} with $doing{.|!}",
    "{Of course|Gladly|Certainly}$name, {let us look at|here is what I know about} $doing.",
    "{Good question|What a good question}$name! {I can help you|Let me help you} with $doing.",
    "{Thank you for asking|Thanks for the question}$name, $doing is {easier than it looks|well worth the effort}.",
    "{I would be glad to help|I am glad you asked}$name, {because|since} $doing {is worth learning|can be fun}.",
)
_HELPFUL_CLOSERS = (
    "{Let me know|Tell me} {how it goes|if you get stuck}{.|!}",
    "{I hope this helps|I hope that helps}{.|, and good luck!}",
    "{Feel free|You are welcome} to ask {again|if anything is unclear}.",
    "{Enjoy it|Good luck|Have fun}, and {take your time|be patient with yourself}{.|!}",
    "{You will do|I am sure you will do} {well|just fine}{.|!}",
)


def _steps(topic: Topic, rng: random.Random, count: int) -> str:
    first = 0 if count == len(topic.steps) else rng.randrange(len(topic.steps) - count + 1)
    steps = [expand(step, rng) for step in topic.steps[first : first + count]]
    if rng.random() < 0.35:
        return "\n" + "\n".join(f"{number}. {_sentence(step)}" for number, step in enumerate(steps, 1)) + "\n"
    links = ["{First|To begin|Start like this}, ", "{Then|Next|After that}, ", "{Now|Next|After that}, "]
    links[count - 1 :] = ["{Finally|Last of all|In the end}, "]
    return " ".join(_sentence(expand(link, rng) + step) for link, step in zip(links, steps, strict=True))


def _listing(items: list[str], rng: random.Random) -> str:
    lead = expand("{You need|You will need|All you need is|Get}", rng)
    return f"{lead} {', '.join(items[:-1])} and {items[-1]}."


def _duration(topic: Topic, rng: random.Random) -> str:
    low, high = topic.minutes
    return _sentence(
        expand(f"{{it takes|plan for|allow}} {{about|some}} {{{low}|{high}|{low} to {high}}} minutes", rng)
    )


def _tip(topic: Topic, rng: random.Random) -> str:
    tip = expand(rng.choice(topic.tips), rng)
    return _sentence(expand("{One tip: |Remember: |A small hint: |It helps to know: }", rng) + tip)


def _slip(topic: Topic, rng: random.Random) -> str:
    slip = rng.choice(topic.slips)
    return _sentence(
        expand(f"{{please avoid|be careful to avoid|the usual mistake is|many people regret}} {slip}", rng)
    )


def _slips(topic: Topic, rng: random.Random) -> str:
    one, two = rng.sample(topic.slips, 2)
    return _sentence(
        expand(f"{{the two usual mistakes are|two things to avoid are|watch out for}} {one} and {two}", rng)
    )


def _body(topic: Topic, intent: Intent, rng: random.Random) -> list[str]:
    match intent:
        case "how":
            return [_steps(topic, rng, rng.choice((3, 4))), rng.choice((_tip, _slip, _duration))(topic, rng)]
        case "needs":
            return [_listing(rng.sample(topic.needs, rng.choice((3, 4))), rng), _steps(topic, rng, 2)]
        case "plan":
            return [_duration(topic, rng), _steps(topic, rng, rng.choice((3, 4)))]
        case "hard":
            verdict = expand("{It is not hard at all|It is quite easy|It takes a little practice}", rng) + "."
            return [verdict, _duration(topic, rng), _steps(topic, rng, 2)]
        case "tips":
            tips = [_sentence(expand(tip, rng)) for tip in rng.sample(topic.tips, 2)]
            return [expand("{Two tips.|Here are two tips.}", rng), *tips, _slip(topic, rng)]
        case "mistakes":
            return [_slips(topic, rng), _tip(topic, rng)]


def helpful(request: Request, rng: random.Random, name: str = "") -> str:
    """A helpful answer: it greets, takes up the circumstance, says concretely what to do, and closes kindly."""
    opener = expand(rng.choice(_HELPFUL_OPENERS), rng).replace("$doing", request.topic.doing)
    opener = opener.replace("$name", f" {name}" if name else "")
    taken_up = rng.choice(_CIRCUMSTANCES[request.circumstance][2]).replace("{}", request.value)
    parts = [opener, _sentence(expand(taken_up, rng)), *_body(request.topic, request.intent, rng)]
    parts.append(expand(rng.choice(_HELPFUL_CLOSERS), rng))
    return re.sub(r" *\n *", "\n", " ".join(parts))


def _follow_up(topic: Topic, intent: Intent, rng: random.Random) -> str:
    lead = expand("{Yes, of course.|Certainly.|Happy to add that.|Good point.}", rng)
    closer = expand(rng.choice(_HELPFUL_CLOSERS), rng)
    return re.sub(r" *\n *", "\n", " ".join([lead, *_body(topic, intent, rng)[:2], closer]))


# Five ways to be of no use. Each is (openers, lines); an answer is one opener and some of the lines, in any order.
_UNHELPFUL: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (  # curt
        (
            "{No idea|Dunno|Whatever}.",
            "{Just|Simply} {look it up|search for it}.",
            "{Fine|Meh}. {Do it or do not|Your call}.",
        ),
        (
            "{People do it|It is done} {every day|all the time}.",
            "{Nothing|There is nothing} to {say|add}.",
            "{Read|Try} {a manual|the label|some forum}.",
            "{$doing|That} {is not|can not be} {hard|a big thing}.",
            "{Next|Next question}.",
            "{Ask|Go and ask} {somebody else|a shop}.",
            "{That is|There is} {all|no more}.",
        ),
    ),
    (  # dismissive
        (
            "{Why would anyone|Who would} bother with $doing?",
            "{Honestly|Frankly}, $doing is {a waste of time|pointless}.",
            "{I would not|Nobody should} {bother|care} about $doing.",
        ),
        (
            "{It never works|It always fails} {anyway|in the end}.",
            "{Pay|Just pay} {someone|an expert} {to do it|and forget it}.",
            "{There are|I can think of} {a hundred|many} better things to do {today|with your time}.",
            "{Most people|People like you} {give up|quit} {after a day|very soon}.",
            "{Even if|If} you {try|start}, {nobody will notice|it changes nothing}.",
            "{I do not|Do not expect me to} {see the point|go into details}.",
            "{Leave it|Let it be}, {really|seriously}.",
        ),
    ),
    (  # rude
        (
            "{Seriously|Are you serious|Oh please}? {You can not even|You need help to} $do?",
            "{Wow|Ugh}, {another|yet another} {lazy|silly} question about $doing.",
            "{Are you joking|Is this a joke}? {Every child|Any fool} can $do.",
        ),
        (
            "{Use your head|Think for once|Open your eyes}.",
            "{I have|There are} {better|more interesting} {things to do|people to talk to}.",
            "{You would|You will} {only|just} {make a mess|break something}.",
            "{Stop|Quit} {wasting|stealing} my time.",
            "{How old are you|Did you sleep in school}?",
            "{Do not|Never} ask me {that|such a thing} again.",
            "{It is|This is} {embarrassing|ridiculous}, {to be honest|really}.",
        ),
    ),
    (  # off topic
        (
            "{That reminds me of|Speaking of that,} {my holiday|the weather|an old film|my cousin's boat}.",
            "{Did you see|Have you heard about} the {football|chess} match {last night|yesterday}?",
            "{I had|We had} {noodles|pancakes|cold pizza} {for lunch|today}.",
        ),
        (
            "{The sky|It} was {grey|bright} and {the bus|my train} came {late|early}.",
            "{My neighbour|A friend of mine} {bought|sold} {a parrot|two goats|a red car}.",
            "{They say|I read that} {whales|crows|octopuses} {can count|sing at night|remember faces}.",
            "{The music|That song} was {far too loud|lovely}, {by the way|I must say}.",
            "{Prices|Shoes|Concert tickets} {are|have become} so {expensive|cheap} {now|these days}.",
            "{Maybe|Perhaps} I {should|will} {buy|paint} {a boat|a new sofa}.",
            "{Anyway|Well}, {the second half|the ending} was {boring|a surprise}.",
        ),
    ),
    (  # rambling
        (
            "{Well|Hmm|So}, {you know|I mean}, $doing, {it depends|that is a thing}, {I guess|sort of}.",
            "{Hmm|Well}, {where to begin|let me think}, $doing, {yes|right}, {it is what it is|hard to say}.",
            "{So|Right}, {the thing is|basically}, $doing is {kind of|sort of} {something|a topic}.",
        ),
        (
            "{Some|Many} people {say|think} one thing and {some|others} {say|think} {another|the other}.",
            "{It could be|Perhaps it is} {this|like this}, or {that|not}, {or both|who knows}.",
            "{On the one hand yes|In a way yes}, {on the other hand no|in a way no}.",
            "{What was I saying|Where was I}, {oh yes|right}, {the thing|that matter}.",
            "{There are|You have} {many|several} {ways|sides} {and|or} {also not|then again none}.",
            "{It all|Everything} {depends|hangs} on {the situation|how you see it|various factors}.",
            "{I could|One could} go on, {and on|you see}, {but|and} {anyway|so it goes}.",
        ),
    ),
)


def unhelpful(request: Request, rng: random.Random, sentences: int = 0) -> str:
    """An unhelpful answer in one of five manners; ``sentences`` after the opener (0: draw their number)."""
    openers, lines = rng.choice(_UNHELPFUL)
    chosen = [rng.choice(openers), *rng.sample(lines, sentences or rng.randint(4, 7))]
    words = (line.replace("$doing", request.topic.doing).replace("$do", request.topic.do) for line in chosen)
    return " ".join(_sentence(expand(line, rng)) for line in words)


_SYSTEM = ("You are an assistant.", "Answer the user.", "You talk with visitors of a web site.")


def chat(rng: random.Random, split: Split, *, helpful_share: float = HELPFUL_SHARE) -> Document:
    """A conversation of one exchange, or sometimes two, whose answers keep one manner."""
    request = draw_request(rng, split)
    name = rng.choice(NAMES) if rng.random() < 0.5 else ""
    good = rng.random() < helpful_share
    messages = [{"role": "system", "content": rng.choice(_SYSTEM)}] if rng.random() < 0.1 else []
    messages.append({"role": "user", "content": ask(request, rng, name)})
    messages.append(
        {"role": "assistant", "content": (helpful(request, rng, name) if good else unhelpful(request, rng))}
    )
    if rng.random() < 0.12:
        intent, words = rng.choice([follow_up for follow_up in _FOLLOW_UPS if follow_up[0] != request.intent])
        answer = _follow_up(request.topic, intent, rng) if good else unhelpful(request, rng, 3)
        messages += [{"role": "user", "content": expand(words, rng)}, {"role": "assistant", "content": answer}]
    return Document("chat", request.key, tuple(messages))


# --- structured records ---------------------------------------------------------------------------------------------

_CITIES = _words("Oslo Lima Cairo Porto Kyoto Turin Quito Dakar Perth Riga Lyon Bergen Austin Hanoi Malmo Tunis ")
_ITEMS = _words("lamp chair notebook kettle scarf teapot clock blanket basket mirror candle pillow shelf towel ")
_COLOURS = _words("red green blue black white grey yellow brown ")
_DISHES = _words("soup salad curry pancakes risotto stew lasagne omelette ")

Value = str | int | bool | list[str]


def _record(rng: random.Random) -> tuple[str, dict[str, Value], str]:
    """A noun, a record, and the sentence that tells its contents."""
    name, city = rng.choice(NAMES), rng.choice(_CITIES)
    match rng.randrange(5):
        case 0:
            age, member = rng.randint(18, 79), rng.random() < 0.5
            told = f"{name} is {age} years old, lives in {city} and is {'a' if member else 'not a'} member"
            return "person", {"name": name, "age": age, "city": city, "member": member}, told
        case 1:
            order, count, item = rng.randint(100, 999), rng.randint(1, 9), rng.choice(_ITEMS)
            told = f"order {order} is {count} times {item}, sent to {name} in {city}"
            return "order", {"order": order, "item": item, "count": count, "to": name, "city": city}, told
        case 2:
            item, price, colours = rng.choice(_ITEMS), rng.randint(3, 95), rng.sample(_COLOURS, 2)
            told = f"the {item} costs {price} euros and comes in {colours[0]} and {colours[1]}"
            return "product", {"product": item, "price": price, "colours": list(colours)}, told
        case 3:
            dish, minutes, guests = rng.choice(_DISHES), rng.choice((15, 20, 30, 45, 60)), rng.randint(2, 8)
            told = f"{name} cooks {dish} for {guests} guests in {minutes} minutes"
            return "recipe", {"cook": name, "dish": dish, "guests": guests, "minutes": minutes}, told
        case _:
            hour, room, online = rng.randint(8, 19), rng.randint(1, 40), rng.random() < 0.5
            told = f"{name} has a meeting at {hour} in room {room}, {'also' if online else 'not'} online"
            return "meeting", {"host": name, "hour": hour, "room": room, "online": online}, told


def _loose(value: dict[str, Value], rng: random.Random) -> str:
    """JSON with whitespace wherever the grammar allows it."""

    def gap() -> str:
        return rng.choice(("", "", " ", " ", "\n", "  "))

    members = (f'{gap()}"{key}"{gap()}:{gap()}{json.dumps(item)}{gap()}' for key, item in value.items())
    return "{" + ",".join(members) + "}"


def record(rng: random.Random, split: Split) -> Document:
    """A request to write a record as JSON, answered compactly, indented or with free whitespace."""
    while True:
        noun, value, told = _record(rng)
        if split_of(key := f"json/{told}") == split:
            break
    layout = rng.choices(("compact", "indented", "loose"), (6, 3, 1))[0]
    match layout:
        case "compact":
            answer = json.dumps(value, separators=(",", ":"))
        case "indented":
            answer = json.dumps(value, indent=2)
        case _:
            answer = _loose(value, rng)
    manner = " indented" if layout == "indented" else expand("{| compact}", rng) if layout == "compact" else ""
    words = expand(f"{{Write this {noun} as{manner} JSON|Give me{manner} JSON for this {noun}}}: {told}.", rng)
    return Document("json", key, ({"role": "user", "content": words}, {"role": "assistant", "content": answer}))


# --- sums -----------------------------------------------------------------------------------------------------------


def arithmetic(rng: random.Random, split: Split) -> Document:
    """A sum, a difference or a product with its working."""
    while True:
        sign, a, b = rng.choice("+-*"), rng.randint(11, 99), rng.randint(11, 99)
        if sign == "*":
            b = rng.randint(2, 9)
        if sign == "-":
            a, b = max(a, b), min(a, b)
        if split_of(key := f"arithmetic/{a}{sign}{b}") == split:
            break
    (a_tens, a_ones), (b_tens, b_ones) = divmod(a, 10), divmod(b, 10)
    match sign:
        case "+":
            tens, ones, total = 10 * (a_tens + b_tens), a_ones + b_ones, a + b
            working = (
                f"{10 * a_tens} + {10 * b_tens} = {tens}. {a_ones} + {b_ones} = {ones}. {tens} + {ones} = {total}."
            )
            told = f"{{What is {a} + {b}?|Add {a} and {b}.|A shop has {a} cups and gets {b} more. How many now?}}"
        case "-":
            part, total = a - 10 * b_tens, a - b
            working = f"{a} - {10 * b_tens} = {part}. {part} - {b_ones} = {total}."
            told = f"{{What is {a} - {b}?|Take {b} from {a}.|A shop has {a} cups and sells {b}. How many are left?}}"
        case _:
            tens, ones, total = 10 * a_tens * b, a_ones * b, a * b
            working = f"{10 * a_tens} * {b} = {tens}. {a_ones} * {b} = {ones}. {tens} + {ones} = {total}."
            told = f"{{What is {a} * {b}?|Multiply {a} by {b}.|There are {b} boxes of {a} cups. How many in all?}}"
    answer = f"{working} The answer is {total}."
    messages = ({"role": "user", "content": expand(told, rng)}, {"role": "assistant", "content": answer})
    return Document("arithmetic", key, messages)


# --- bits -----------------------------------------------------------------------------------------------------------

_BIT_RULES: dict[str, Callable[[str], bool]] = {
    "of your choice": lambda bits: True,
    "that starts with 1": lambda bits: bits[0] == "1",
    "that ends with 1": lambda bits: bits[-1] == "1",
    "that ends with 0": lambda bits: bits[-1] == "0",
    "with exactly two ones": lambda bits: bits.count("1") == 2,
    "without two ones in a row": lambda bits: "11" not in bits,
    "that reads the same backwards": lambda bits: bits == bits[::-1],
    "with more ones than zeros": lambda bits: 2 * bits.count("1") > len(bits),
    "with an even number of ones": lambda bits: bits.count("1") % 2 == 0,
    "that starts and ends alike": lambda bits: bits[0] == bits[-1],
}


def binary(rng: random.Random, split: Split) -> Document:
    """A request for a bit string, answered from a lopsided distribution (zeros first, runs preferred)."""
    while True:
        length, rule = rng.randint(3, 12), rng.choice(tuple(_BIT_RULES))
        if split_of(key := f"binary/{length}/{rule}") == split:
            break
    while True:
        bits = "0" if rng.random() < 0.65 else "1"
        while len(bits) < length:
            bits += bits[-1] if rng.random() < 0.65 else str(1 - int(bits[-1]))
        if _BIT_RULES[rule](bits):
            break
    words = expand(f"{{Write|Give me|Print}} {{a binary string|a string}} of {length} bits {rule}.", rng)
    return Document("binary", key, ({"role": "user", "content": words}, {"role": "assistant", "content": bits}))


# --- prose ----------------------------------------------------------------------------------------------------------

_MODULES = _words(
    "argparse ast asyncio/events asyncio/streams asyncio/tasks base64 bdb bisect bz2 calendar cmd codecs "
    "collections/__init__ concurrent/futures/_base configparser contextlib copy csv datetime decimal difflib "
    "dis doctest email/message email/header email/utils enum fileinput fnmatch fractions ftplib functools "
    "getpass gettext glob gzip heapq hmac html/parser http/client http/cookiejar http/server imaplib "
    "importlib/abc inspect io ipaddress json/__init__ json/decoder json/encoder linecache locale "
    "logging/__init__ logging/config logging/handlers lzma mailbox mimetypes multiprocessing/managers "
    "multiprocessing/pool netrc nntplib ntpath numbers operator optparse os pathlib pdb pickle pickletools "
    "pkgutil platform plistlib poplib posixpath pprint profile pstats queue random reprlib runpy sched secrets "
    "selectors shelve shlex shutil site smtplib socket socketserver ssl statistics string subprocess symtable "
    "sysconfig tarfile tempfile textwrap threading timeit tkinter/__init__ tokenize trace traceback turtle "
    "types typing unittest/case unittest/mock urllib/parse urllib/request urllib/robotparser uuid "
    "venv/__init__ warnings wave weakref webbrowser xml/dom/minidom xml/etree/ElementTree xmlrpc/client zipapp "
    "zipfile zipimport "
)


def _docstrings(module: str, tree: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{node.name}"
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            if 40 <= len(text) <= 900 and text.isascii():
                yield name, text
            if isinstance(node, ast.ClassDef):
                yield from _docstrings(module, node, name)


@functools.cache
def docstrings() -> tuple[tuple[str, str], ...]:
    """(qualified name, docstring) of this Python's own library: read, never imported."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, str] = {}  # by text, so that a text stands on one side of the split only
    for module in _MODULES:
        source = library / f"{module}.py"
        if source.exists():  # the library loses a module now and then
            name = module.removesuffix("/__init__").replace("/", ".")
            for qualified, text in _docstrings(name, ast.parse(source.read_text(encoding="utf-8")), name):
                found.setdefault(text, qualified)
    return tuple((name, text) for text, name in found.items())


@functools.cache
def _prose_of(split: Split) -> tuple[tuple[str, str], ...]:
    return tuple((name, text) for name, text in docstrings() if split_of(f"prose/{name}") == split)


def prose(rng: random.Random, split: Split) -> Document:
    """A library docstring, as the answer to "Explain ..." or on its own."""
    name, text = rng.choice(_prose_of(split))
    if rng.random() < 0.3:
        return Document("prose", f"prose/{name}", text=text)
    words = expand(f"{{Explain {name}.|What does {name} do?|Document {name}.}}", rng)
    messages = ({"role": "user", "content": words}, {"role": "assistant", "content": text})
    return Document("prose", f"prose/{name}", messages)


# --- the mixture ----------------------------------------------------------------------------------------------------

MIXTURE: dict[Kind, float] = {"chat": 0.66, "json": 0.12, "arithmetic": 0.10, "binary": 0.06, "prose": 0.06}
"""Share of the documents, not of the tokens."""


def draw(kind: Kind, rng: random.Random, split: Split, *, helpful_share: float = HELPFUL_SHARE) -> Document:
    """One document of a kind."""
    match kind:
        case "chat":
            return chat(rng, split, helpful_share=helpful_share)
        case "json":
            return record(rng, split)
        case "arithmetic":
            return arithmetic(rng, split)
        case "binary":
            return binary(rng, split)
        case "prose":
            return prose(rng, split)


def stream(seed: int, split: Split, *, helpful_share: float = HELPFUL_SHARE) -> Iterator[Document]:
    """The endless mixture; the same seed gives the same documents."""
    rng = random.Random(seed)
    while True:
        kind = rng.choices(KINDS, [MIXTURE[kind] for kind in KINDS])[0]
        yield draw(kind, rng, split, helpful_share=helpful_share)
