#!/usr/bin/env bash
# Prepare the text of this recipe.
# usage: prepare.sh TEXT [--from FOLDER] [--cut]      (see ../README.md; safe to run again)
exec python "$(dirname "$0")/../prepare.py" multi30k_de_en "$@"
