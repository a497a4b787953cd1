"""English words of a piece of text without white space, as spaCy's blank English pipeline splits it.

The published rules count such words: 'don't' is two, a full stop is one. The rules and their order are spaCy's
(`spacy.lang.en`, `spacy.lang.punctuation`, `spacy.tokenizer`, MIT); the character classes are Unicode's own where spaCy
lists characters, so a few pieces of rare scripts and symbols are split otherwise.
"""

import itertools
import re

import regex

# Longer pieces are one word: the affixes of a megabyte of punctuation would be taken off one by one.
LONGEST = 10_000

_PUNCTUATION = '…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪'
_QUOTES = '\'"”“`‘´’‚,„»«「」『』（）〔〕【】《》〈〉〈〉⟦⟧'
_CURRENCY = '$£€¥฿₽﷼₴₠₡₢₣₤₥₦₧₨₩₪₫₭₮₯₰₱₲₳₵₶₷₸₹₺₻₼₾₿'
_UNITS = (
    'km² km³ km/h kmh km m² m³ m/s mm² mm³ mm mph mbar mb mg m dm² dm³ dm cm² cm³ cm ha hPa µm µg nm yd in ft kg kb g '
    'gb t tb lb oz Pa MB KB GB TB T G M K % км² км³ км/ч км м² м³ м/с мм² мм³ мм мбар мб мг м дм² дм³ дм см² см³ см нм '
    'кг г кПа Па Кб КБ кб Мб МБ Гб ГБ гб Тб ТБ'
)
# Scripts without case count as lower and as upper case: Ethiopic, Bengali, Hebrew, Persian, Sinhala, Devanagari,
# Kannada, Tamil, Telugu, Hangul, Kana, CJK.
_UNCASED = (
    r'\u1200-\u137F\u0980-\u09FF\u0591-\u05F4\uFB1D-\uFB4F\u0620-\u064A\u066E-\u06D5\u06E5-\u06FF\u0750-\u077F'
    r'\u08A0-\u08BD\uFB50-\uFDFB\uFE70-\uFEFC\u0D80-\u0DFF\u0900-\u097F\u0C00-\u0CFF\u0B80-\u0BFF\u1100-\u11FF'
    r'\uAC00-\uD7FF\u3130-\u318F\u3040-\u30FF\uFF66-\uFF9D\u3400-\u4DBF\u4E00-\u9FFF\u2E80-\u2FFF\u3000-\u303F'
    r'\u31C0-\u31FF\u3200-\u33FF\uF900-\uFAFF\uFE30-\uFE4F\U00020000-\U0002FA1F'
)
_CASED = r'\p{Script=Latin}\p{Script=Cyrillic}\p{Script=Greek}'
_LOWER, _UPPER = (rf'[[\p{{{case}}}&&[{_CASED}]]||[{_UNCASED}]]' for case in ('Ll', 'Lu'))
_LETTER = rf'[[[\p{{Ll}}\p{{Lu}}]&&[{_CASED}]]||[{_UNCASED}]]'


def _characters(characters: str) -> str:
    return f'[{re.escape(characters)}]'


_PREFIX = regex.compile(
    rf'[§%=—–]|\+(?![0-9])|{_characters(_PUNCTUATION)}|\.\.+|{_characters(_QUOTES)}|[UCA]S?\$|{_characters(_CURRENCY)}|\p{{So}}',
    regex.V1,
)  # fmt: skip
_SUFFIX = regex.compile(
    rf"(?:{_characters(_PUNCTUATION)}|…+|\.\.+|{_characters(_QUOTES)}|\p{{So}}|['’][sS]|[—–]|(?<=[0-9])\+"
    rf'|(?<=°[FfCcKk])\.|(?<=[0-9])(?:{_characters(_CURRENCY)}|US\$|C\$|A\$|{"|".join(map(re.escape, _UNITS.split()))})'
    rf'|(?<=[0-9%²+|\-]|{_LOWER}|{_characters(_PUNCTUATION + _QUOTES)})\.|(?<={_UPPER}{_UPPER})\.)$',
    regex.V1,
)
_INFIX = regex.compile(
    rf'\.\.+|…|\p{{So}}|(?<=[0-9])[+\-*^](?=[0-9-])|(?<={_LOWER}|{_characters(_QUOTES)})\.(?={_UPPER}|{_characters(_QUOTES)})'
    rf'|(?<={_LETTER}),(?={_LETTER})|(?<={_LETTER}|[0-9])(?:-|–|—|--|---|——|~)(?={_LETTER})|(?<={_LETTER}|[0-9])[:<>=/](?={_LETTER})',
    regex.V1,
)  # fmt: skip
# After mathiasbynens.be/demo/url-regex (Perini, MIT); an address with a dot is one word.
_HOST = r'(?:(?:[A-Za-z0-9\u00a1-\uffff][A-Za-z0-9\u00a1-\uffff_-]{0,62})?[A-Za-z0-9\u00a1-\uffff]\.)+'
_ADDRESS = regex.compile(
    r'(?:[\w+\-.]{2,}://)?(?:\S+(?::\S*)?@)?(?:(?!(?:10|127)(?:\.\d{1,3}){3})(?!(?:169\.254|192\.168)(?:\.\d{1,3}){2})'
    r'(?!172\.(?:1[6-9]|2\d|3[0-1])(?:\.\d{1,3}){2})(?:[1-9]\d?|1\d\d|2[01]\d|22[0-3])'
    r'(?:\.(?:1?\d{1,2}|2[0-4]\d|25[0-5])){2}(?:\.(?:[1-9]\d?|1\d\d|2[0-4]\d|25[0-4]))'
    rf'|{_HOST}{_LOWER}{{2,63}})(?::\d{{2,5}})?(?:[/?#]\S*)?',
    regex.V1,
)
_LONGEST_ADDRESS = 500  # the expression above goes back and forth in long ones

_EMOTICONS = r"""
:) :-) :)) :-)) :))) :-))) (: (-: =) (= :] :-] [: [-: [= =] :o) (o: :} :-} 8) 8-) (-8 ;) ;-) (; (-; :( :-( :(( :-((
:((( :-((( ): )-: =( >:( :') :'-) :'( :'-( :/ :-/ =/ =| :| :-| ]= =[ :1 :P :-P :p :-p :O :-O :o :-o :0 :-0 :() >:o :*
:-* :3 :-3 =3 :> :-> :X :-X :x :-x :D :-D ;D ;-D =D xD XD xDD XDD 8D 8-D ^_^ ^__^ ^___^ >.< >.> <.< ._. ;_; -_- -__-
v.v V.V v_v V_V o_o o_O O_o O_O 0_o o_0 0_0 o.O O.o O.O o.o 0.0 o.0 0.o @_@ <3 <33 <333 </3 (^_^) (-_-) (._.) (>_<)
(*_*) (¬_¬) ಠ_ಠ ಠ︵ಠ (ಠ_ಠ) ¯\(ツ)/¯ (╯°□°）╯︵┻━┻ ><(((*>
"""
_WHOLE = r"""
\t \n — ' \") <space> '' C++ ä. ö. ü. em ll nuff 'em 'll 'nuff 'S 's ‘S ‘s and/or w/o 're 'Cause 'cause 'cos 'Cos 'coz
'Coz 'cuz 'Cuz 'bout ma'am Ma'am o'clock O'clock 'd a.m. p.m. Adm. Bros. co. Co. Corp. D.C. Dr. e.g. E.g. E.G. Gen.
Gov. i.e. I.e. I.E. Inc. Jr. Ltd. Md. Messrs. Mo. Mont. Mr. Mrs. Ms. Ph.D. Prof. Rep. Rev. Sen. St. vs. v.s. Mt. Ak.
Ala. Apr. Ariz. Ark. Aug. Calif. Colo. Conn. Dec. Del. Feb. Fla. Ga. Ia. Id. Ill. Ind. Jan. Jul. Jun. Kan. Kans. Ky.
La. Mar. Mass. Mich. Minn. Miss. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. Oct. Okla. Ore. Pa. S.C. Sep.
Sept. Tenn. Va. Wash. Wis.
"""
_OTHERS = (
    "y' all|y all|how 'd 'y|How 'd 'y|not 've|not ve|Not 've|Not ve|can not|Can not|gon na|Gon na|got ta|Got ta|let 's"
    "|Let 's|c'm on|C'm on"
)
# Words of their own, though they look like a contraction without its apostrophe.
_NO_CONTRACTIONS = 'Ill ill Its its Hell hell Shell shell Shed shed were Were Well well Whore whore'
_DROPPED_G = 'doin goin nothin nuthin ol somethin lovin havin'


def _with_and_without_apostrophe(heads: str, tails: str) -> list[str]:
    """Every head, also capitalised, with every tail, also without apostrophes; the parts with spaces between them."""
    both = ((head, tail) for head in heads.split() for tail in tails.split(','))
    return [
        f'{cased} {written}'
        for head, tail in both
        for cased in (head, head.title())
        for written in (tail, tail.replace("'", ''))
    ]


def _exceptions() -> dict[str, list[str]]:
    """Piece -> its words, for the pieces that the rules below do not apply to."""
    parted = [
        *_with_and_without_apostrophe('i', "'m,'m a"),
        *_with_and_without_apostrophe('i you he she it we they', "'ll,'ll 've,'d,'d 've"),
        *_with_and_without_apostrophe('i you we they', "'ve"),
        *_with_and_without_apostrophe('you we they', "'re"),
        *_with_and_without_apostrophe('he she it', "'s"),
        *_with_and_without_apostrophe(
            'who what when where why how there that this these those', "'ll,'ll 've,'d,'d 've"
        ),
        *_with_and_without_apostrophe('who what when where why how there that this', "'s"),
        *_with_and_without_apostrophe('who what when where why how there these those', "'re,'ve"),
        *_with_and_without_apostrophe(
            'ca could do does did had may might must need ought sha should wo would', "n't,n't 've"
        ),
        *_with_and_without_apostrophe('could might must should would', "'ve"),
        *_with_and_without_apostrophe('ai are is was were have has dare', "n't"),
        *(f'{hour} {half}' for hour in range(1, 13) for half in ('a.m.', 'am', 'p.m.', 'pm')),
        *_OTHERS.split('|'),
    ]
    whole = [*_EMOTICONS.split(), *_WHOLE.split(), *(f'{letter}.' for letter in 'abcdefghijklmnopqrstuvwxyz')]
    for word in _DROPPED_G.split():
        whole += [f'{cased}{end}' for cased in (word, word.title()) for end in ('', "'")]
    found = {part.replace(' ', ''): part.split() for part in parted} | {word: [word] for word in whole}
    found |= {f'°{letter}.': ['°', letter, '.'] for letter in 'cfkCFK'}
    for word in _NO_CONTRACTIONS.split():
        found.pop(word, None)
    return found | {
        piece.replace("'", '’'): [word.replace("'", '’') for word in words] for piece, words in found.items()
    }


_EXCEPTIONS = _exceptions()
# Most pieces of a text: letters or digits, also with hyphens or an apostrophe within, between a mark or two. Where a
# full stop or hyphen parts depends on the script: these are letters that spaCy lists.
_LATIN = 'A-Za-zÀ-ÖØ-öø-ž'
_DASH = '(?:--?|[–—])'
_DASHES = re.compile(f'({_DASH})')
_PLAIN = re.compile(
    rf"""(["“‘(\[]?)([{_LATIN}]+(?:{_DASH}[{_LATIN}]+)*"""
    r"""|[A-Za-z]+['’](?![sS](?![A-Za-z]))[A-Za-z]+|[^\W\d_]+|[0-9]+)(['’]s)?"""
    r"""((?:(?:(?<=[a-z0-9à-öø-ÿа-я])|(?<=[A-Z][A-Z]))\.|[,!?])["”’)]?|["”’][.,;:!?]?|[)\]][.,;!?]?|[;:])?"""
)


def split_words(piece: str) -> list[str]:
    """The words of a piece of text that has no white space; joined, they are the piece."""
    if piece in _EXCEPTIONS:
        return _EXCEPTIONS[piece]
    if piece.isalpha() or len(piece) > LONGEST:
        return [piece]
    if match := _PLAIN.fullmatch(piece):
        mark, core, possessive, marks = match.groups('')
        parts = _DASHES.split(core)
        last = parts[-1]
        if not (
            mark + parts[0] in _EXCEPTIONS
            or core in _EXCEPTIONS
            or last in _EXCEPTIONS
            or last + possessive in _EXCEPTIONS
            or last + marks[:1] in _EXCEPTIONS
        ):
            return [word for word in (mark, *parts, possessive, *marks) if word]
    return _with_exceptions(_by_affixes(piece, _EXCEPTIONS))


def _by_affixes(piece: str, exceptions: dict[str, list[str]]) -> list[str]:
    """Prefixes and suffixes taken off, one after the other, then what is left split at its infixes."""
    prefixes: list[str] = []
    suffixes: list[str] = []
    last_length = 0
    while piece and len(piece) != last_length and piece not in exceptions:
        last_length = len(piece)
        prefix = match.end() if (match := _PREFIX.match(piece)) else 0
        if prefix and piece[prefix:] in exceptions:
            prefixes.append(piece[:prefix])
            piece = piece[prefix:]
            break
        suffix = len(piece) - match.start() if (match := _SUFFIX.search(piece, prefix)) else 0
        if suffix and piece[:-suffix] in exceptions:
            suffixes.append(piece[-suffix:])
            piece = piece[:-suffix]
            break
        if prefix:
            prefixes.append(piece[:prefix])
        if suffix and prefix + suffix <= len(piece):
            suffixes.append(piece[-suffix:])
            piece = piece[:-suffix]
        piece = piece[prefix:]
    return prefixes + _core(piece, exceptions) + suffixes[::-1]


def _core(piece: str, exceptions: dict[str, list[str]]) -> list[str]:
    if not piece:
        return []
    if piece in exceptions:
        return exceptions[piece]
    if piece.isalpha() or ('.' in piece and len(piece) < _LONGEST_ADDRESS and _ADDRESS.fullmatch(piece)):
        return [piece]
    words, start = [], 0
    for match in _INFIX.finditer(piece):
        if match.start() == 0:
            continue
        if match.start() != start:
            words.append(piece[start : match.start()])
        words.append(match[0])
        start = match.end()
    return words + [piece[start:]] if start < len(piece) else words


def _affixed_exceptions() -> dict[tuple[str, ...], list[str]]:
    """Words that the rules above make of an exception -> its words, where they would take it apart."""
    return {
        tuple(_by_affixes(piece, {})): words
        for piece, words in _EXCEPTIONS.items()
        if _PREFIX.match(piece) or _SUFFIX.search(piece) or _INFIX.search(piece)
    }


_AFFIXED = _affixed_exceptions()
_LENGTHS = sorted({len(words) for words in _AFFIXED if len(words) > 1}, reverse=True)
_PAIRS = {words[:2] for words in _AFFIXED if len(words) > 1}


def _with_exceptions(words: list[str]) -> list[str]:
    """Exceptions that were taken apart are put together; the longest first, then the first."""
    if not any(pair in _PAIRS for pair in itertools.pairwise(words)):
        return words
    taken: dict[int, int] = {}  # start -> end
    for length, start in itertools.product(_LENGTHS, range(len(words))):
        end = start + length
        free = all(end <= other or other_end <= start for other, other_end in taken.items())
        if end <= len(words) and free and tuple(words[start:end]) in _AFFIXED:
            taken[start] = end
    result, position = [], 0
    for start in sorted(taken):
        result += words[position:start] + _AFFIXED[tuple(words[start : taken[start]])]
        position = taken[start]
    return result + words[position:]
