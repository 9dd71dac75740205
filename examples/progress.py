"""Progress of long work: a bar on a terminal, elsewhere a line every ten seconds.

To copy an example without this file, write `from tqdm import tqdm as progress`.
"""

from jlora._progress import progress as progress
