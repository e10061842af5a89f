"""Market-1501: from its owners' archive to a folder that o2cap reads."""

from unpacking import Benchmark, main

ACCESS = """\
Verify and unpack Market-1501 (Zheng et al., «Scalable Person Re-identification: A
Benchmark», ICCV 2015): 32,668 pictures of 1,501 people, 6 cameras on a campus.

Where to get it: the authors' page,
https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html
Terms: the page gives it to researchers and asks them to cite the paper; ask the authors
before any other use. The pictures show people who do not know you: keep them private.

  python data_scripts/market1501.py Market-1501-v15.09.15.zip data/market1501
"""

# The checksum is the one that Cysu/open-reid publishes for Market-1501-v15.09.15.zip.
BENCHMARK = Benchmark("market1501", ACCESS, md5="65005ab7d12ec1c44de4eeafe813e68a")

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
