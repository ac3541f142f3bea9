"""The generative model: networks, losses, weight averaging, training loops and quality metrics.

Importing this package needs torch alone; the training loops (`gan.training`, `gan.inversion`) need
lightning-fabric as well and are imported by name.
"""

from gan.networks import Critic, Encoder, Generator, NetworkConfig

__all__ = ["Critic", "Encoder", "Generator", "NetworkConfig"]
