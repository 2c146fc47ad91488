import sys

from fact_convert.cli.main import main

sys.exit(main())
