package main

import (
	"context"
	"errors"
	"iter"

	"causeway/agent/api"

	"github.com/spf13/cobra"
)

// query is a command that asks the agent for one thing and prints it, once or whenever it changes.
type query[T any] struct {
	use, short, long string
	example          string
	get              func(*api.Client, context.Context) (T, error)
	// watch is nil if the thing can't be watched.
	watch func(*api.Client, context.Context) iter.Seq2[T, error]
	print func(*printer, T)
	// verdict, if set, turns the answer into the command's exit status; not when watching.
	verdict func(T) error
}

func (q query[T]) command(e *env) *cobra.Command {
	f := formatTable
	var watching bool
	cmd := &cobra.Command{
		Use:     q.use,
		Short:   q.short,
		Long:    q.long,
		Example: q.example,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := e.client(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			return q.run(cmd.Context(), e, c, f, watching)
		},
	}
	outputFlag(cmd, &f)
	if q.watch != nil {
		watchFlag(cmd, &watching)
	}
	return cmd
}

func watchFlag(cmd *cobra.Command, watching *bool) {
	cmd.Flags().BoolVarP(watching, "watch", "w", false, "print it again whenever it changes, until interrupted")
}

func (q query[T]) run(ctx context.Context, e *env, c *api.Client, f format, watching bool) error {
	if watching {
		return q.follow(ctx, e, c, f)
	}
	return q.once(ctx, e, c, f)
}

func (q query[T]) once(ctx context.Context, e *env, c *api.Client, f format) error {
	v, err := q.get(c, ctx)
	if err != nil {
		return err
	}
	if f == formatTable {
		q.print(e.printer(), v)
	} else if err := encode(e.out, f, v, false); err != nil {
		return err
	}
	if q.verdict != nil {
		return q.verdict(v)
	}
	return nil
}

// follow prints until ctx ends, which is no failure: there is no other way to stop watching.
func (q query[T]) follow(ctx context.Context, e *env, c *api.Client, f format) error {
	for v, err := range q.watch(c, ctx) {
		switch {
		case errors.Is(err, context.Canceled) && ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		case f != formatTable:
			if err := encode(e.out, f, v, true); err != nil {
				return err
			}
		default:
			q.redraw(e, v)
		}
	}
	return nil
}

// redraw replaces what was printed before on a terminal, and follows it otherwise.
func (q query[T]) redraw(e *env, v T) {
	p := e.printer()
	if e.terminal {
		p.printf("\x1b[H\x1b[2J")
	}
	p.printf("%s\n", p.now.Format("15:04:05.000"))
	q.print(p, v)
	if !e.terminal {
		p.printf("\n")
	}
}
