"""A small text with the statistics of language: made-up words, frequent and rare, that follow one another by habit.

What lmplz (of PyPI's kenlm 0.3.0) estimates from it is lmplz.arpa.gz, and what KenLM's Python module says of further
sentences is kenlm.json. They were made with

    python -m tests.data.documents.ngram_models.made_up_text text > text.txt
    lmplz --order 4 --prune 0 0 1 --text text.txt --arpa lmplz.arpa
    python -m tests.data.documents.ngram_models.made_up_text kenlm lmplz.arpa > kenlm.json
"""

import json
import random
import sys


def sentences(count: int, seed: int) -> list[str]:
    """As many sentences, the same ones every time."""
    chance = random.Random(7)
    words = [''.join(chance.choices('abcdefgiklmnoprstu', k=2 + i % 5)) for i in range(900)]
    habits = [chance.sample(words, 5) for _ in words]
    chance = random.Random(seed)
    result = []
    for _ in range(count):
        sentence = [words[int(900 * chance.random() ** 4)]]
        while chance.random() < 0.88:
            follows = habits[words.index(sentence[-1])]
            usual = chance.random() < 0.7
            sentence.append(chance.choice(follows) if usual else words[int(900 * chance.random() ** 4)])
        result.append(' '.join(sentence))
    return result


TEXT = sentences(400, seed=1)
# With a word and a context that the text has not.
OTHERS = [*sentences(12, seed=2), 'xyzzy ' + TEXT[0], TEXT[1] + ' xyzzy xyzzy ' + TEXT[2]]

if __name__ == '__main__':
    if sys.argv[1] == 'text':
        print('\n'.join(TEXT))
    else:
        import kenlm

        model = kenlm.Model(sys.argv[2])
        print(json.dumps([[round(p, 7) for p, _, _ in model.full_scores(sentence)] for sentence in OTHERS]))
