"""Which tests `scripts/test.sh` leaves to `scripts/test.sh --all`, because they take long.

Most repeat quicker ones on another model, sampler, format or number. Some are the only test of a slow script. Each has
an entry here: the test, and which of its cases the quick run keeps. [] keeps none, a list keeps the cases with these
ids, and a number n keeps every n-th case.
"""

from collections import defaultdict

import pytest

KEPT: dict[str, list[str] | int] = {
    "cli/test_bad_input.py::test_a_mistake_is_one_plain_line_and_touches_nothing": 4,
    "cli/test_bad_input.py::test_a_mistake_is_one_plain_line_of_a_fresh_process_too": 3,
    "cli/test_end_to_end.py::test_single_file_model_with_hps_and_aesthetic": [],
    "cli/test_fields.py::test_in_every_family": ["flux"],
    "distributed/test_processes.py::test_in_double_precision_micro_batches_agree_to_the_last_digits": [],
    "distributed/test_processes.py::test_with_chunks_of_a_fixed_size_the_micro_batch_changes_no_bit": [],
    "distributed/test_sharding.py::test_one_process_and_fsdp2_make_the_same_run": [],
    "docs/test_docs.py::test_a_command_of_main_runs": 8,
    "docs/test_docs.py::test_a_script_runs": [
        "scripts/config_docs.py-", "scripts/reward_table.py-", "scripts/install_hps.sh-",
        "scripts/push_to_hub.py-logs/my_run --repo user/name --private",
    ],
    "docs/test_docs.py::test_scripts_need_nothing_that_only_tests_need": [],
    "networks/test_foreign.py::test_every_layer_is_what_the_file_says": 4,
    "networks/test_geneval.py::test_drawn_pictures_get_their_verdict": 2,
    "networks/test_planner.py::test_the_plan_measures_the_gpu_of_this_machine_only_if_no_other_is_named": [],
    "networks/test_reward_skeleton.py::test_a_full_size_reward_has_a_gradient_without_memory": [
        "clip", "hps", "dino", "lpips",
    ],
    "networks/test_reward_skeleton.py::test_vqascore_has_more_models_of_full_size": [],
    "networks/test_sd.py::test_a_single_file_is_the_model_of_its_folder": 2,
    "networks/test_skeleton.py::test_a_full_size_model_runs_without_memory": 2,
    "networks/test_sweep.py::test_chunks_and_kept_graphs_change_nothing": 4,
    "networks/test_sweep.py::test_sweep_is_exact_in_float64": 4,
    "networks/test_sweep.py::test_with_a_retained_graph_the_second_is_the_first_once_more": 2,
    "runs/test_ddpo.py::test_a_reward_without_gradient_is_followed": [],
    "runs/test_ddpo.py::test_the_micro_batch_changes_rounding_only": [],
    "runs/test_ddpo.py::test_two_processes_train_like_one": [],
    "runs/test_definitions.py::test_the_gradient_is_none_of_full": 3,
    "runs/test_definitions.py::test_the_sweep_is_the_definition": 2,
    "runs/test_definitions.py::test_the_sweep_is_the_definition_in_float32": ["bridge"],
    "runs/test_export.py::test_a_plain_pipeline_predicts_with_the_file_what_ours_does": 4,
    "runs/test_export.py::test_fused_layers_of_the_released_width_come_apart_in_diffusers": [],
    "runs/test_families.py::test_a_negative_prompt_is_the_pipelines": 2,
    "runs/test_families.py::test_a_run_stops_continues_and_its_lora_is_the_pipelines": ["z_image"],
    "runs/test_families.py::test_pictures_that_are_not_square_are_the_pipelines": 2,
    "runs/test_families.py::test_the_gradient_is_autograds": 2,
    "runs/test_forecast.py::test_a_forecast_counts_what_a_field_adds": [],
    "runs/test_forecast.py::test_a_forecast_counts_what_a_prefix_cache_predicts": [],
    "runs/test_forecast.py::test_a_forecast_from_files_is_that_of_the_loaded_parts": [],
    "runs/test_forecast.py::test_a_forecast_is_what_a_real_step_needs": ["balanced"],
    "runs/test_forecast.py::test_a_forecast_knows_of_copies_and_early_exits": 2,
    "runs/test_forecast.py::test_a_forecast_needs_no_package_of_an_optimizer": [],
    "runs/test_forecast.py::test_a_forecast_of_the_bytes_that_move": [],
    "runs/test_forecast.py::test_kept_steps_cost_fewer_operations_the_more_there_are": [],
    "runs/test_frozen_loras.py::test_text_encoders_and_other_families": ["flux"],
    "runs/test_hub.py::test_training_publishes_its_run_and_the_token_stays_where_it_is": [],
    "runs/test_library.py::test_a_persons_script_trains_the_same_on_two_processes": [],
    "runs/test_memory_policies.py::test_every_combination_gives_the_gradient_of_autograd": ["2-x-x"],
    "runs/test_memory_policies.py::test_the_gradient_through_tiles_is_that_of_plain_autograd": [],
    "runs/test_memory_policies.py::test_the_policies_need_less_and_less": [],
    "runs/test_memory_policies.py::test_tiles_make_a_picture_of_the_same_size": [],
    "runs/test_memory_policies.py::test_tiles_take_less_memory_and_their_pictures_differ_a_little": [],
    "runs/test_numerics.py::test_a_lora_with_b_zero_gives_the_base_pictures_to_the_byte": ["no"],
    "runs/test_numerics.py::test_the_gradient_in_bfloat16": [],
    "runs/test_numerics.py::test_the_sweep_recomputes_the_rollout_to_the_bit": ["options2"],
    "runs/test_prefix_cache.py::test_a_run_uses_it_in_training_alone": [],
    "runs/test_process.py::test_a_process_that_does_not_answer_is_ended": [],
    "runs/test_process.py::test_a_reward_that_is_no_use_is_refused_as_it_is_here": 2,
    "runs/test_process.py::test_rewards_made_from_the_projects_classes": 2,
    "runs/test_process_reward.py::test_a_second_death_ends_the_run_in_one_line_and_keeps_its_checkpoints": [],
    "runs/test_quantized.py::test_a_checkpoint_goes_on_with_another_format_of_its_base": [],
    "runs/test_quantized.py::test_a_forecast_counts_the_bytes_of_a_format": [],
    "runs/test_quantized.py::test_a_resumed_run_is_the_uninterrupted_one": [],
    "runs/test_quantized.py::test_activations_on_the_host_change_no_bit_of_a_run": [],
    "runs/test_quantized.py::test_streaming_changes_no_bit_of_a_run": [],
    "runs/test_report.py::test_the_checkpoint_that_the_report_recommends_is_kept": [],
    "runs/test_schedulers.py::test_a_policy_gradient_needs_independent_steps": [],
    "runs/test_schedulers.py::test_latents_are_those_of_the_pipeline": 4,
    "runs/test_schedulers.py::test_leaps_are_refused_where_a_step_does_not_reach_a_later_one": [],
    "runs/test_schedulers.py::test_the_gradient_is_that_of_plain_autograd": 8,
    "runs/test_schedules.py::test_a_run_that_was_stopped_continues_on_its_schedule": ["2"],
    "runs/test_schedules.py::test_a_run_with_more_epochs_is_the_run_that_had_them_from_the_start": [],
    "runs/test_schedules.py::test_an_optimizer_of_another_package_trains_and_resumes": ["prodigy"],
    "runs/test_schedules.py::test_ddpo_counts_every_update": [],
    "runs/test_schedules.py::test_ddpo_resumes_in_the_middle_of_its_schedule": [],
    "runs/test_single_file.py::test_what_a_file_says_of_itself_counts": 3,
    "runs/test_sizes.py::test_the_gradient_of_a_step_is_that_of_a_run_with_its_size_alone": 3,
    "runs/test_speed.py::test_compiled_blocks_of_lean_layers": [],
    "runs/test_speed.py::test_compiled_blocks_train_alike_and_are_compiled_once": [],
    "runs/test_tasks.py::test_a_plan_names_every_policy_and_the_first_that_fits": [],
    "runs/test_trainer.py::test_asked_to_stop_anywhere_a_run_saves_and_goes_on_as_if_nothing_had_been": [],
    "runs/test_trainer.py::test_held_out_evaluation_during_training_changes_no_step": [],
    "runs/test_trainer.py::test_regularisers_do_not_depend_on_the_micro_batch": 2,
    "runs/test_trainer.py::test_the_pull_towards_the_base_is_its_gradient": 2,
    "runs/test_weights.py::test_every_optimizer_trains_and_resumes": ["adamw"],
    "scripts/test_bakeoff.py::test_a_bake_off_from_the_command_line": [],
    "scripts/test_check_gpu.py::test_a_row_is_measured_and_forecast_on_the_cpu": [],
    "scripts/test_cost.py::test_a_few_steps_say_what_all_of_them_cost": [],
    "scripts/test_cost.py::test_rows_have_the_planners_figures_and_what_encoding_costs": [],
    "scripts/test_cost.py::test_their_step_costs_the_same_on_meta_as_in_reality": 2,
    "scripts/test_formats.py::test_an_alignment_on_each_format": [],
    "scripts/test_formats.py::test_gradients_alone": [],
    "scripts/test_gpu_bench.py::test_the_script_runs_to_its_end_on_a_cpu": [],
    "scripts/test_prefix_cache.py::test_the_script_runs_to_its_end_and_is_continued": [],
    "scripts/test_pretrain_tiny.py::test_a_killed_stage_goes_on_to_the_same_weights": [],
    "scripts/test_pretrain_tiny.py::test_every_part_is_written_and_loads": [],
    "scripts/test_pretrain_tiny.py::test_finished_stages_are_skipped": [],
    "scripts/test_pretrain_tiny.py::test_the_evaluation_states_every_figure": [],
    "scripts/test_pretrain_tiny.py::test_the_head_has_the_known_files_layout": [],
    "scripts/test_pretrain_tiny.py::test_the_heads_rating_is_in_units_of_the_rating": [],
    "scripts/test_reward_references.py::test_a_reward_equals_its_reference": [
        "clip", "aesthetic", "hpsv3", "mps", "vqascore_qwen", "vqascore_clip_t5", "clip_image", "dinov3", "lpips",
    ],
    "scripts/test_reward_references.py::test_the_hpsv2_backend_is_the_package": [],
    "unit/test_packed.py::test_the_gradient_is_near_that_of_the_unquantised_network": 2,
    "unit/test_packed.py::test_the_gradient_is_that_of_autograd_through_the_unpacked_weights": 2,
}  # fmt: skip


def mark_exhaustive(items: list[pytest.Item]) -> None:
    """Marks the cases that the quick run leaves out."""
    cases = defaultdict(list)
    for item in items:
        name, _, case = item.nodeid.removeprefix("tests/").partition("[")
        cases[name].append((case.removesuffix("]"), item))
    for name in KEPT.keys() & cases.keys():
        kept, ids = KEPT[name], [case for case, _ in cases[name]]
        quick = ids[::kept] if isinstance(kept, int) else kept
        for case, item in cases[name]:
            if case not in quick:
                item.add_marker(pytest.mark.exhaustive)


def stale(items: list[pytest.Item]) -> list[str]:
    """The names in KEPT that no test of a complete collection has."""
    names = {item.nodeid.removeprefix("tests/").partition("[")[0] for item in items}
    ids = {item.nodeid.removeprefix("tests/") for item in items}
    lost = [name for name in KEPT if name not in names]
    lists = {name: kept for name, kept in KEPT.items() if isinstance(kept, list)}
    return lost + [f"{name}[{case}]" for name, kept in lists.items() for case in kept if f"{name}[{case}]" not in ids]
