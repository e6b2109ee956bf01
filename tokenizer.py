"""Text to token ids and back, for the three tokenizers that Llama-family checkpoints come with.

They are Hugging Face's `tokenizer.json`, a SentencePiece `tokenizer.model`, and the rank file that
Llama 3 ships under that same name. Two ideas keep this small. Every token is a few bytes, so
decoding is joining bytes, and a stream holds back what is not yet a whole character. And what a
person types is never control: the libraries know pieces of text only, control tokens are put
between them here, and nothing but a chat template can ask for one.
"""

from __future__ import annotations

import base64
import codecs
import json
import math
import os
import re
from pathlib import Path

from chat_template import BUILT_IN, Renderer
from cli import UserError
from files import read_bytes, read_json
from keys import Keys
from process import muted

MARK = "\ufdd0"  # Unicode sets this code point aside for use inside programs: no text has it

# No published vocabulary has a sixtieth of this, and no gap in one is as wide.
MAX_IDS = 2**24
MAX_GROWTH = 10**4  # by a normalizer, as `growth` bounds it; published ones lengthen no text

# Byte-level BPE spells a byte as a printable character: itself, or one from U+0100 on.
OTHERS = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
BYTE_CHARS = [chr(0x100 + OTHERS.index(b) if b in OTHERS else b) for b in range(256)]
CHAR_BYTES = {char: bytes([byte]) for byte, char in enumerate(BYTE_CHARS)}

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = (  # in the places after the ranks; `-` and all the rest of 256 are reserved
    "begin_of_text end_of_text - - finetune_right_pad_id - "
    "start_header_id end_header_id eom_id eot_id python_tag" + " -" * 245
)


def clean(text: str) -> str:
    """Put U+FFFD in place of what has no UTF-8, and of MARK."""
    return re.sub(f"[\ud800-\udfff{MARK}]", "\ufffd", text)


def default_template(value, path: Path) -> str | None:
    """The chat template that a tokenizer_config.json holds, alone or in a list of named ones."""
    value = "" if value is None else value
    named = value if isinstance(value, list) else [{"name": "default", "template": value}]
    texts = [[x.get(k) for k in ("name", "template")] for x in named if isinstance(x, dict)]
    if len(texts) < len(named) or not all(isinstance(x, str) for pair in texts for x in pair):
        what = f"the chat_template in {path} is neither a text nor a list of named ones"
        raise UserError(f"{what}; fetch the file again")
    return dict(texts).get("default")


def token_name(config: Keys, key: str) -> str | None:
    """The name of a token in tokenizer_config.json: a text, or the content of an object."""
    name = config.values.get(key)
    name = name.get("content") if isinstance(name, dict) else name
    if not isinstance(name, str) and config.has(key):
        raise config.refusal(key, "neither a text nor an object with a content")
    return name


def any_of(names: dict[str, int]) -> str:
    """A regular expression for any of `names`, the longest one that is there."""
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"


class Tokenizer:
    """The tokenizer of one checkpoint folder.

    `bos_id` is None where there is none, `eos_ids` holds every id that ends a text or a turn,
    `vocab_size` is one more than the highest id, `text_size` one more than the highest that plain
    text can give, and `chat_template` is None where `chat` fails.
    """

    def __init__(self, encode, pieces: dict, special: dict, visible: dict, bos_id, eos_id):
        """`special` control tokens are not shown, `visible` ones are, all by name; -1 is no id.

        `encode` gives the ids of a text, and is told whether it is the start of a whole one.
        """
        if not pieces:
            raise ValueError("it has no tokens")
        self.encode_part, self.special, self.controls = encode, special, special | visible
        self.pieces = {i: piece for piece, i in (pieces | visible).items()}
        self.pieces |= dict.fromkeys(special.values(), "")
        self.vocab_size, self.text_size = max(self.pieces) + 1, max(pieces.values()) + 1
        self.alphabet = {"▁": b" "} if "▁" in pieces else CHAR_BYTES
        # Decoding takes away the one space that encoding put before the text, if it did.
        self.lead = b" " * any(self.pieces[i].startswith("▁") for i in encode("a", True))
        # A control token that is a piece too could be typed: its characters stand for its id then.
        names = self.controls.items()
        self.means = {i: [pieces[c] for c in name if c in pieces] for name, i in names}
        self.means |= {name: [i] for name, i in names}
        self.bos_id, self.eos_ids = (bos_id if bos_id >= 0 else None), {eos_id}
        self.renderer = Renderer()
        self.template_args: dict = {}  # what the chat template is told beside the messages

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Open the tokenizer of a checkpoint folder, and add what its other files say about it."""
        self = open_folder(folder)
        files = [folder / f"{x}config.json" for x in ("tokenizer_", "generation_", "")]
        config, *others = [
            Keys(read_json(file) if os.path.lexists(file) else {}, str(file)) for file in files
        ]
        self.names = {key: token_name(config, key) for key in ("bos_token", "eos_token")}
        self.names = {key: name for key, name in self.names.items() if name is not None}
        self.adds_bos = config.flag("add_bos_token", self.bos_id is not None)
        self.bos_id = self.controls.get(self.names.get("bos_token"), self.bos_id)
        ends = [self.names.get("eos_token"), "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
        self.eos_ids |= {self.controls.get(name) for name in ends}
        for other in others:
            ids = other.get("eos_token_id", [])
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int for i in ids):
                raise other.refusal("eos_token_id", "neither a number nor a list of numbers")
            self.eos_ids |= {*ids}
        self.eos_ids = {i for i in self.eos_ids - {None} if 0 <= i < self.vocab_size}

        path = folder / "chat_template.jinja"
        if os.path.lexists(path):
            try:
                template = read_bytes(path).decode()
            except UnicodeDecodeError as error:
                raise UserError(f"cannot read {path} ({error}); fetch the file again") from None
        else:
            template = default_template(config.values.get("chat_template"), files[0])
        built_in = (chat for name, chat in BUILT_IN.items() if name in self.controls)
        self.chat_template = template or next(built_in, None)
        return self

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of plain text, after BOS if the model wants it; `</s>` in it is four characters."""
        start = [self.bos_id] if bos and self.adds_bos and self.bos_id is not None else []
        return start + self.encode_marked(clean(text))

    def encode_marked(self, text: str) -> list[int]:
        """Ids of text in which MARK and the name of a control token stand for that token."""
        ids = []
        for i, part in enumerate(re.split(f"{MARK}({any_of(self.controls)})", text)):
            found = [part] if i % 2 else self.encode_part(part, i == 0)
            ids += [k for j in found for k in self.means.get(j, [j])]
        return ids

    def chat(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation of {"role", "content"}, up to where the assistant is to speak.

        Names of control tokens within a message hold a MARK while the template is filled in, and
        so stay text. Only the assistant's own visible ones, such as </think>, are what they say.
        """

        def guard(role: str, content: str) -> str:
            names = any_of(self.special if role == "assistant" else self.controls)
            return re.sub(f"(?={names}).", rf"\g<0>{MARK}", clean(content), flags=re.DOTALL)

        def guard_all(value):
            if isinstance(value, dict):
                return {guard_all(key): guard_all(item) for key, item in value.items()}
            if isinstance(value, list):
                return [guard_all(item) for item in value]
            return guard("user", value) if isinstance(value, str) else value

        messages = [guard_all(m) | {"content": guard(m["role"], m["content"])} for m in messages]
        if self.chat_template is None:
            raise UserError("there is no chat template in the checkpoint; --no-chat goes without")
        variables = {"messages": messages, "add_generation_prompt": True} | self.names
        variables = guard_all(self.template_args) | variables
        try:
            text = self.renderer.render(self.chat_template, variables)
        except (ValueError, OSError) as error:
            raise UserError(f"the chat template fails ({error}); --no-chat goes without") from None
        names = f"{MARK}|({any_of(self.controls)})"
        return self.encode_marked(re.sub(names, lambda m: MARK + m[1] if m[1] else "", text))

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, without special tokens; bytes that are not UTF-8 give U+FFFD."""
        stream = StreamDecoder(self)
        return "".join(map(stream.push, ids)) + stream.flush()

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for: none for a special token or an unknown id."""
        piece = self.pieces.get(token, "")
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes.fromhex(piece[3:5])
        return b"".join(self.alphabet.get(char) or char.encode() for char in piece)


class StreamDecoder:
    """Text of ids that come one by one after a prompt, in whole characters.

    Exactly what `decode` makes of the prompt and the ids, less what it makes of the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int] = ()):
        self.tokenizer, self.lead = tokenizer, tokenizer.lead
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token in prompt_ids:
            self.push(token)

    def push(self, token: int) -> str:
        """The characters that `token` completes."""
        data = self.tokenizer.token_bytes(token)
        text = self.utf8.decode(data.removeprefix(self.lead))
        self.lead = b"" if data else self.lead
        return text

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was cut off."""
        return self.utf8.decode(b"", final=True)


# ---- The three kinds of file -------------------------------------------------------------------


def open_folder(folder: Path) -> Tokenizer:
    """Open tokenizer.json, else tokenizer.model, whose content says which kind it is."""
    path = folder / "tokenizer.json"
    if not os.path.lexists(path) and os.path.lexists(folder / "tokenizer.model"):
        path = folder / "tokenizer.model"
    return open_data(path, path.name, read_bytes(path))


def open_data(where: Path | str, name: str, data: bytes) -> Tokenizer:
    """Open what a file of this name holds; `UserError` says what is wrong in `where`."""
    try:
        with muted():
            if name.endswith(".json"):
                return open_json(data)
            return open_ranks(data) if re.match(rb"\S+ \d+\s", data) else open_sentencepiece(data)
    except ImportError as error:
        raise UserError(f"{where} needs a package; pip install {error.name}") from None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of any class: the libraries have none, and Rust's panic is one
        what = f"cannot read a tokenizer from {where} ({error!s:.300})"
        raise UserError(f"{what}; use the model's own tokenizer") from None


def open_sentencepiece(data: bytes) -> Tokenizer:
    """Open a SentencePiece model."""
    from sentencepiece import SentencePieceProcessor

    library = SentencePieceProcessor(model_proto=data)
    pieces = {library.id_to_piece(i): i for i in range(len(library))}
    special = {piece: i for piece, i in pieces.items() if library.is_control(i)}
    ends = library.bos_id(), library.eos_id()
    return Tokenizer(lambda text, _: library.encode(text), pieces, special, {}, *ends)


def open_json(data: bytes) -> Tokenizer:
    """Open a tokenizer.json; its post-processor says whether a text starts with BOS."""
    import tokenizers

    content = json.loads(data)
    special, visible = {}, {}
    tokens = content.get("added_tokens") if isinstance(content, dict) else None
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        raise ValueError("it is no object with a list of added_tokens")
    for token in tokens:
        name, i, hidden = map(token.get, ("content", "id", "special"))
        if not isinstance(name, str) or not name or name != clean(name):
            raise ValueError(f"{name!r:.80} is no name of an added token")
        if type(i) is not int or not 0 <= i < MAX_IDS:
            raise ValueError(f"the id of added token {name!r:.80} is not a number below {MAX_IDS}")
        if type(hidden) is not bool:
            raise ValueError(f"added token {name!r:.80} is neither special nor not")
        (special if hidden else visible)[name] = i
    times = growth(content.get("normalizer"))
    if times > MAX_GROWTH:
        raise ValueError(f"its normalizer makes a text up to {times:.3g} times as long")
    content |= {"added_tokens": [], "truncation": None, "padding": None}
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    first, empty = (library.encode(text).ids[:1] for text in ("a", ""))
    return from_library(library, special, visible, first[0] if first and first == empty else -1)


def growth(normalizer) -> float:
    """How many times as long as a text its normal form may be, by all replacements together."""
    if isinstance(normalizer, list):
        return math.prod(map(growth, normalizer))
    if not isinstance(normalizer, dict):
        return 1.0
    times, new, pattern = 1.0, normalizer.get("content"), normalizer.get("pattern")
    if isinstance(new, str):
        old = pattern.get("String") if isinstance(pattern, dict) else None
        times = max(1.0, len(new) / len(old)) if old else 1.0 + len(new)  # a regex may match ""
    return times * growth(normalizer.get("normalizers"))


def open_ranks(data: bytes) -> Tokenizer:
    """Open a Llama-3 rank file, lines of `base64 rank`: two parts merge if the whole has a rank."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    lines = [line.split() for line in data.splitlines()]
    tokens = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    if list(tokens.values()) != list(range(len(lines))):
        raise ValueError("a rank or a token is missing, or there twice")
    if max(map(len, tokens)) > 1024:  # every cut of a token is looked at
        raise ValueError("a token has more than 1024 bytes")
    pieces = {"".join(BYTE_CHARS[b] for b in token): rank for token, rank in tokens.items()}
    pairs = ((piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece)))
    merges = [(left, right) for left, right in pairs if left in pieces and right in pieces]
    library = Tokenizer(models.BPE(pieces, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    reserved = (f"reserved_special_token_{i}" for i in range(248))
    names = [next(reserved) if name == "-" else name for name in LLAMA3_SPECIALS.split()]
    special = {f"<|{name}|>": i for i, name in enumerate(names, len(pieces))}
    return from_library(library, special, {}, len(pieces))


def from_library(library, special: dict, visible: dict, bos_id: int) -> Tokenizer:
    """Make the tokenizer of a `tokenizers.Tokenizer` that has no added tokens."""
    pieces = library.get_vocab()
    library.add_special_tokens([MARK])  # text after a MARK is not the start of a text

    def encode(text: str, is_start: bool) -> list[int]:
        try:
            with muted():
                text = text if is_start else MARK + text
                ids = library.encode(text, add_special_tokens=False).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # of any class, as in open_data
            why = f"{error!s:.300}"
            raise UserError(f"the tokenizer has no tokens for this text ({why})") from None
        return ids if is_start else ids[1:]

    return Tokenizer(encode, pieces, special, visible, bos_id, -1)
