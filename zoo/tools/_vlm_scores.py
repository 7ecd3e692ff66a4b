"""How an answer is scored: exact match, and VQA accuracy with the normalisation of its evaluation code."""

from __future__ import annotations

import re

_NUMBERS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten')
_NUMBER_OF = {'none': '0', **{word: str(i) for i, word in enumerate(_NUMBERS)}}
_ARTICLES = frozenset(('a', 'an', 'the'))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r'(?!<=\d)(\.)(?!\d)')  # the lookahead that was meant as a lookbehind is part of the metric
_COMMA = re.compile(r'(\d)(,)(\d)')
# forms the metric puts an apostrophe into when it is missing; with two of them, also when only one is missing
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've 'ow's'at
""".split()


def _contractions() -> dict[str, str]:
    table = {"somebody'd": 'somebodyd'}
    for form in _CONTRACTED:
        places = [i for i, c in enumerate(form) if c == "'"]
        for i in places:  # one apostrophe missing, the others there
            table[form[:i] + form[i + 1 :]] = form
    return table


_CONTRACTIONS = _contractions()


def normalise_vqa(text: str) -> str:
    """An answer as VQA's evaluation code compares it: punctuation, number words, articles, contractions, lower case.

    Source: `vqaEval.py` of github.com/GT-Vision-Lab/VQA (PythonEvaluationTools).

    Args:
        text: An answer.
    """
    text = text.replace('\n', ' ').replace('\t', ' ').strip()
    digits_apart = _COMMA.search(text) is not None
    shown = text
    for mark in _PUNCTUATION:
        beside_space = f'{mark} ' in text or f' {mark}' in text
        shown = shown.replace(mark, '' if beside_space or digits_apart else ' ')
    shown = _PERIOD.sub('', shown)
    words = [_NUMBER_OF.get(word, word) for word in shown.lower().split()]
    return ' '.join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(said: str, answers: list[str]) -> float:
    """Soft accuracy of VQA in [0, 1]: a third for each other annotator who agrees, averaged over leaving one out.

    The evaluation code leaves answers alone when all annotators wrote the same; here they are always normalised.

    Args:
        said: The model's answer.
        answers: Those of the annotators, usually ten; a single answer counts as agreed on.
    """
    given = normalise_vqa(said)
    known = [normalise_vqa(a) for a in answers]
    if len(known) < 4:
        return float(given in known)
    return sum(min(1.0, (known.count(given) - (a == given)) / 3) for a in known) / len(known)


def exact_match(said: str, answers: list[str]) -> float:
    """1 if the answer is one of the right ones, apart from case, spaces at the ends or in a row, and a final period.

    Args:
        said: The model's answer.
        answers: The right ones.
    """

    def plain(text: str) -> str:
        return ' '.join(text.casefold().split()).removesuffix('.').strip()

    return float(plain(said) in {plain(a) for a in answers})
