"""How fast and how well documents are prepared, a step a command, against the libraries that others use for it.

    python -m tools.benchmarks.data STEP [--megabytes=3] [--rounds=3] [--files=GLOB]

What is compared is measured in turns on one core: MB of UTF-8 a second of the process's own time, medians. It needs
the extras [documents] and [oracle], and `minhash` rensa.

extraction: main text of the 91 shared pages, by the stage and by resiliparse and trafilatura with their defaults; F1 as
the benchmark has it that the pages are from.

filters: the rules of FineWeb (gin_configs/documents/fineweb_rules.gin) against datatrove's filters, on the same
documents; and how often both agree. `cold` begins with an empty table of words each round, as no long run does; `warm`
has seen the documents before. Both judge every document by every rule; datatrove stops at the first rule that removes a
document, as its pipelines do.

pii: precision and recall by kind in generated texts, where half of what looks like personal data is none; speed on real
texts, also against datatrove's formatter, which looks for addresses alone.

minhash: signatures of 112 hash functions (14 bands of 8) over word 5-grams; of rensa (`pip install rensa`) over single
words of `split()`.

near_duplicates: pairs of articles that are known to be near duplicates, through all phases of deduplication and
datatrove's four steps; `others` are pairs that the list does not have.

processes: the job with two processes and one. Wall times say something on a quiet machine alone, so CPU times are told,
too, with the most that two processors could make of them.

kills: no benchmark: workers, and whole jobs, are killed `rounds` times each at random, and what the job then leaves
must be the bytes of one that was not.
"""

import argparse

from tools.benchmarks.data.duplicates import minhash, near_duplicates
from tools.benchmarks.data.extraction import extraction
from tools.benchmarks.data.kills import kills
from tools.benchmarks.data.personal_data import pii
from tools.benchmarks.data.processes import processes
from tools.benchmarks.data.rules import filters

STEPS = {
    'extraction': extraction,
    'filters': filters,
    'pii': pii,
    'minhash': minhash,
    'near_duplicates': near_duplicates,
    'processes': processes,
    'kills': kills,
}


def main() -> None:
    """Measure the step that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('step', choices=STEPS)
    parser.add_argument('--megabytes', type=float, default=3.0)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--files', default='')
    arguments = parser.parse_args()
    STEPS[arguments.step](arguments)


if __name__ == '__main__':
    main()
