"""A process of Beam's direct runner that says on the console only what is an error."""

import logging
import sys

if __name__ == "__main__":
    # Beam sets the level of the logger, so the handler has to choose. Errors of the work itself
    # reach the runner by another way.
    handler = logging.StreamHandler()
    handler.setLevel(logging.ERROR)
    logging.basicConfig(handlers=[handler], force=True)

    from apache_beam.runners.worker import sdk_worker_main  # warns of what Google's extra lacks

    sdk_worker_main.main(sys.argv)
