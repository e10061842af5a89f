"""MSMT17, V1 or V2: from its owners' archive to a folder that o2cap reads."""

from unpacking import Benchmark, main

ACCESS = """\
Verify and unpack MSMT17 (Wei et al., «Person Transfer GAN to Bridge Domain Gap for
Person Re-Identification», CVPR 2018): 126,441 pictures of 4,101 people, 15 cameras.

Where to get it: on request from its owners at Peking University,
https://www.pkuvmc.com/dataset.html
(or, when that page does not answer, from the authors of the paper).
Terms: those of the agreement that the owners send; research only, not to be passed on.
V2 masks the faces that V1 shows; results differ by 1 to 2 points, so say which one you
used (the reader names it). The four list_*.txt files must be there.

  python data_scripts/msmt17.py MSMT17_V2.zip data/msmt17
"""

BENCHMARK = Benchmark("msmt17", ACCESS)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
