"""What the policy is told about this node: its name, its size, what its cages hold; kept current."""

from collections.abc import Callable
from dataclasses import replace

from mycoswarmd.daemon.gpuwatch import GpuWatch
from mycoswarmd.daemon.settings import Settings
from mycoswarmd.flow.prompt import Node, Prompts
from mycoswarmd.flow.swarm import Swarm
from mycoswarmd.inventory.host import read_host, tier_of
from mycoswarmd.sandbox.capability import Capability
from mycoswarmd.wire.probing import Gpus


class OwnFacts:
    """One per daemon.

    Attributes:
        host: what this machine is.
        watch: who keeps what is known of graphics cards.
        capability: what cages can be here just now.
    """

    def __init__(self, settings: Settings, capability: Callable[[], Capability], watch: GpuWatch) -> None:
        self._settings = settings
        self._prompts: Prompts | None = None
        self.capability = capability
        self.host = read_host()
        self.watch = watch
        watch.on_change = self._take_tier

    @property
    def gpus(self) -> Gpus:
        """What is known of graphics cards."""
        return self.watch.gpus

    def node(self) -> Node:
        """Return what is known before there is a roster."""
        tier = tier_of(self.host, self.gpus.found)
        return Node(name=self._settings.node_name, tier=tier, sandbox=self.capability().level)

    def follow(self, prompts: Prompts, swarm: Swarm) -> Callable[[], None]:
        """Tell `prompts` of every change from now on, until what is returned is called."""
        self._prompts = prompts

        def take_name() -> None:
            """Be called what the roster says."""
            me = swarm.member(swarm.self_id or "")
            prompts.node = replace(prompts.node, name=me.name if me is not None else self._settings.node_name)

        take_name()
        return swarm.subscribe(take_name)

    def take_sandbox(self) -> None:
        """Say what the last cage proved."""
        if self._prompts is not None:
            level = self.capability().level
            self._prompts.node = replace(self._prompts.node, sandbox=level)

    def _take_tier(self) -> None:
        """Be of the class that the cards make of this machine."""
        if self._prompts is not None:
            tier = tier_of(self.host, self.gpus.found)
            self._prompts.node = replace(self._prompts.node, tier=tier)
