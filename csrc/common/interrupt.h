// Ctrl-C in the middle of long computations.
#pragma once

namespace iresnet_fast {

// Raises KeyboardInterrupt in Python if the user asked for it; to be called by the thread that Python called.
void check_interrupt();

}  // namespace iresnet_fast
