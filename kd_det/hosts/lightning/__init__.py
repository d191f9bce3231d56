"""What the hosts on Lightning share: hardware, callbacks, optimiser."""
