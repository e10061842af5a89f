"""DukeMTMC-reID: from an archive that a person holds to a folder that o2cap reads."""

from unpacking import Benchmark, main

ACCESS = """\
Verify and unpack DukeMTMC-reID (Ristani et al., ECCV workshops 2016; Zheng et al., ICCV
2017): 36,411 pictures, 8 cameras.

WITHDRAWN in 2019. The people whom the cameras recorded at Duke University in 2014 had
not given informed consent. The university's review board had approved recording indoors
and handing the data to researchers who ask; the recording was made outdoors and put on
an open website. The university took it down, and the author apologised in public.

There is nowhere to ask for it, and this project links no copy and shows no picture of
it. The reader exists so that those who hold the data can check published numbers. Ask
your ethics board first, do not pass the data on, and prefer Market-1501, MSMT17 or the
embedded set for new work.

  python data_scripts/dukemtmcreid.py DukeMTMC-reID.zip data/dukemtmcreid
"""

BENCHMARK = Benchmark("dukemtmcreid", ACCESS)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
