"""Where an adapter lies on a mesh, from where its base lies. Imports the trees and the adapters."""

from ._specs import moments as moments
from ._specs import replicated as replicated
from ._specs import specs as specs
