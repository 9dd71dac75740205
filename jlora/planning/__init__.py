"""What a training step needs on each device. Imports sharding, the trees and the core."""

from ._plan import Plan as Plan
from ._plan import plan as plan
