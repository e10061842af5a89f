"""VeRi-776: from its owners' archive to a folder that o2cap reads."""

from unpacking import Benchmark, main

ACCESS = """\
Verify and unpack VeRi-776 (Liu et al., «Large-scale vehicle re-identification in urban
surveillance videos», ICME 2016): 51,035 pictures of 776 vehicles, 20 cameras.

Where to get it: on request from its owners,
https://github.com/JDAI-CV/VeRidataset
(send full name and affiliation to the person named there).
Terms: non-commercial use only; the owners ask to cite their papers. Number plates can
be legible: keep the pictures private.

  python data_scripts/veri776.py VeRi.zip data/veri776
"""

BENCHMARK = Benchmark("veri776", ACCESS)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
