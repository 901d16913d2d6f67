"""Results of inference."""


def newest_results(folder):
    """The folder that the last run with `--output_dir folder` wrote into: `folder`, `folder`_2, ..."""
    folders = [folder, *folder.parent.glob(f"{folder.name}_[0-9]*")]
    return max(folders, key=lambda path: int(path.name[len(folder.name) + 1 :] or 1))
