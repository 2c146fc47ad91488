import sys

from fact_train.cli.main import main

sys.exit(main())
