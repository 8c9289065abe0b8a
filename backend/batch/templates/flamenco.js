// SPDX-License-Identifier: GPL-3.0-or-later
// Flamenco 3 job type: a batch of people, one task per shard, then one manifest.
// Save it as scripts/populace-batch.js beside Flamenco Manager, and restart the Manager.

const JOB_TYPE = {
    label: "Populace Batch",
    description: "Makes the people of a plan. A task that was interrupted goes on where it was.",
    settings: [
        { key: "plan", type: "string", subtype: "file_path", required: true,
          description: "One request per line, see: populace batch --help" },
        { key: "out", type: "string", subtype: "dir_path", required: true,
          description: "Folder of all shards, seen under the same path by every worker" },
        { key: "shards", type: "int32", default: 8,
          description: "Tasks to split the plan into; the files do not depend on it" },
        { key: "preset", type: "string", choices: ["none", "unreal", "unity", "godot"], default: "none",
          description: "Units, axes and bone names of the files" },
        { key: "populace", type: "string", default: "populace", visible: "submission",
          description: "The command on the workers; may be a Flamenco variable such as {populace}" },
    ],
};

function compileJob(job) {
    const settings = job.settings;
    const shared = [settings.plan, "--out", settings.out, "--preset", settings.preset];

    const manifest = author.Task("manifest", "misc");
    manifest.addCommand(author.Command("exec", {
        exe: settings.populace,
        args: ["batch"].concat(shared, ["--merge"]),
    }));
    for (let shard = 1; shard <= settings.shards; shard++) {
        const task = author.Task(`shard-${shard}`, "misc");
        task.addCommand(author.Command("exec", {
            exe: settings.populace,
            args: ["batch"].concat(shared, ["--shard", `${shard}/${settings.shards}`, "--resume", "--json"]),
        }));
        job.addTask(task);
        manifest.addDependency(task);
    }
    job.addTask(manifest);
}
