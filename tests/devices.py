"""A device process and its doors in a thread of this one, of Linux."""

import socket
import threading
from contextlib import contextmanager

from common.refusal import Refusal
from serve.front_ends.batcher import Dialer
from serve.front_ends.device import Device
from serve.request.job import Served
from serve.request.limits import Limits

LIMITS = Limits(max_images=5, max_queue=8)


class Running:
    """A device with `doors` for front ends."""

    def __init__(self, runtime, limits, load=None, num_front_ends=2):
        self.pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(num_front_ends)]
        self.limits, self.batches = limits, []
        doors = [inside for _, inside in self.pairs]
        load = load or (lambda: [runtime])
        try:
            self.device = Device(Served((runtime,)), doors, limits, load=load)
        except Refusal:
            self.close()
            raise
        self.device.observe_batch = self.batches.append
        self.thread = threading.Thread(target=self.device.run)
        self.thread.start()

    def door(self, index=0):
        return self.pairs[index][0]

    def dial(self, index=0):
        return Dialer(self.door(index))

    def cut(self):
        """All connections end, as when a device process is killed."""
        for peer in list(self.device._peers):
            peer._transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def end(self):
        self.device.stop()
        self.thread.join(60)
        assert not self.thread.is_alive(), "a connection is still open"
        self.close()

    def close(self):
        for end in (end for pair in self.pairs for end in pair):
            end.close()


@contextmanager
def running(runtime, limits=LIMITS, **options):
    """`with running(runtime) as it`: a device and its doors."""
    it = Running(runtime, limits, **options)
    try:
        yield it
    finally:
        it.end()
