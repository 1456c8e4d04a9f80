package shim

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// report is the descriptor on which shim and init say what went wrong; closed without a word once all is well.
const report = 3

// Run starts the container that spec describes, with dir as its directory, by a shim in cgroup, and returns once its first process runs.
// Its error says why the container did not start; that is then also how it ended.
func Run(dir, cgroup string, spec Spec) error {
	for _, fifo := range []string{Stdin, Resize} {
		if err := unix.Mkfifo(filepath.Join(dir, fifo), 0o600); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
	if err := write(filepath.Join(dir, specFile), spec); err != nil {
		return err
	}
	cg, err := openCgroup(cgroup)
	if err != nil {
		return err
	}
	defer cg.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	p, err := os.StartProcess("/proc/self/exe", []string{shimName, dir}, &os.ProcAttr{
		Dir: "/", Env: []string{}, Files: []*os.File{null, null, null, w},
		Sys: &syscall.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: int(cg.Fd())},
	})
	w.Close()
	if err != nil {
		return fmt.Errorf("starting a shim: %w", err)
	}
	go p.Wait() // else it stays as a zombie; how the container ended is in its directory
	failure, err := io.ReadAll(r)
	if err == nil && len(failure) > 0 {
		err = errors.New(string(failure))
	}
	return err
}

// shim starts the container in dir, waits for it and writes how it ended.
func shim(dir string) int {
	reports := os.NewFile(report, "report")
	unix.CloseOnExec(report)
	ended, err := hold(dir, func() { reports.Close() })
	if err != nil {
		ended = Exit{At: time.Now(), Code: startFailed, Reason: StartError, Message: err.Error()}
	}
	werr := write(filepath.Join(dir, exitFile), ended)
	if err = errors.Join(err, werr); err != nil {
		fmt.Fprint(reports, err)
		return 1
	}
	return 0
}

func hold(dir string, running func()) (Exit, error) {
	spec, err := read[Spec](filepath.Join(dir, specFile))
	if err != nil {
		return Exit{}, err
	}
	log, err := openLog(spec.Log)
	if err != nil {
		return Exit{}, err
	}
	cg, err := openCgroup(spec.Cgroup)
	if err != nil {
		return Exit{}, err
	}
	defer cg.Close()
	if spec.NetNS != "" {
		if err := setNS(spec.NetNS, unix.CLONE_NEWNET); err != nil {
			return Exit{}, err
		}
	}
	stdio, err := openStdio(dir, spec, log)
	if err != nil {
		return Exit{}, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return Exit{}, err
	}
	defer r.Close()
	p, err := os.StartProcess("/proc/self/exe", []string{initName, dir}, &os.ProcAttr{
		Dir: "/", Env: []string{}, Files: append(stdio.child[:], w),
		Sys: &syscall.SysProcAttr{
			Setsid: true, Setctty: spec.Terminal, Ctty: 0, UseCgroupFD: true, CgroupFD: int(cg.Fd()),
			Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		},
	})
	w.Close()
	for _, f := range stdio.child {
		f.Close()
	}
	if err != nil {
		return Exit{}, fmt.Errorf("starting the container's first process: %w", err)
	}
	failure, err := io.ReadAll(r)
	if err == nil && len(failure) > 0 {
		err = errors.New(string(failure))
	}
	if err == nil {
		err = write(filepath.Join(dir, startFile), Start{At: time.Now(), PID: p.Pid, Shim: os.Getpid(), ShimTime: startTime(os.Getpid())})
	}
	if err != nil {
		p.Kill()
		p.Wait()
		return Exit{}, err
	}
	running()
	stdio.serve()
	state, err := p.Wait()
	if err != nil {
		return Exit{}, err
	}
	at := time.Now()
	stdio.drain()
	return exitOf(state.Sys().(syscall.WaitStatus), at), nil
}

func exitOf(ws syscall.WaitStatus, at time.Time) Exit {
	e := Exit{At: at, Code: exitCode(ws), Reason: Completed}
	if e.Code != 0 {
		e.Reason = Failed
	}
	return e
}

func exitCode(ws syscall.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// stdio connects a container's input and output.
type stdio struct {
	child   [3]*os.File // the container's ends
	serve   func()      // input and size, once the container runs
	copying sync.WaitGroup
}

// drain waits until all output is in the log: every process of the container has ended, so that nobody holds its end open.
func (s *stdio) drain() { s.copying.Wait() }

func openStdio(dir string, spec Spec, log *logFile) (*stdio, error) {
	s := &stdio{serve: func() {}}
	if spec.Terminal {
		master, slave, err := OpenTerminal()
		if err != nil {
			return nil, fmt.Errorf("making a terminal: %w", err)
		}
		s.child = [3]*os.File{slave, slave, slave}
		s.copying.Go(func() { log.copyChunks("stdout", master) })
		s.serve = func() {
			go fromFIFO(filepath.Join(dir, Stdin), func(r io.Reader) bool { io.Copy(master, r); return true })
			go fromFIFO(filepath.Join(dir, Resize), func(r io.Reader) bool {
				d := json.NewDecoder(r)
				for size := (Size{}); d.Decode(&size) == nil; {
					size.Set(master)
				}
				return true
			})
		}
		return s, nil
	}
	in, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	if spec.Stdin {
		in.Close()
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		in = r
		s.serve = func() {
			go func() {
				fromFIFO(filepath.Join(dir, Stdin), func(r io.Reader) bool { io.Copy(w, r); return !spec.Once })
				w.Close()
			}()
		}
	}
	s.child[0] = in
	for i, stream := range []string{"stdout", "stderr"} {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		s.child[i+1] = w
		s.copying.Go(func() { log.copyLines(stream, r) })
	}
	return s, nil
}

// fromFIFO gives handle what each writer writes (those that write at once count as one), until it has had enough.
func fromFIFO(path string, handle func(io.Reader) bool) {
	for {
		f, err := os.Open(path) // waits for a writer
		if err != nil {
			return
		}
		more := handle(f)
		f.Close()
		if !more {
			return
		}
	}
}

// logFile is written in the format of CRI's logs: time, stream, F for a whole line or P for a part of one, and the text.
type logFile struct {
	mu   sync.Mutex
	path string
	f    *os.File
}

// openLog opens the log, and opens it anew at SIGUSR1, for the kubelet renames it when it is long.
func openLog(path string) (*logFile, error) {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o640)
	if err != nil {
		return nil, fmt.Errorf("opening the container's log: %w", err)
	}
	l := &logFile{path: path, f: f}
	reopen := make(chan os.Signal, 1)
	signal.Notify(reopen, unix.SIGUSR1)
	go func() {
		for range reopen {
			if f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o640); err == nil {
				l.mu.Lock()
				l.f.Close()
				l.f = f
				l.mu.Unlock()
			}
		}
	}()
	return l, nil
}

// ReopenLog has the shim open its log's path anew.
func (s Start) ReopenLog() error {
	if !s.Alive() {
		return nil
	}
	return unix.Kill(s.Shim, unix.SIGUSR1)
}

func (l *logFile) line(stream string, whole bool, text []byte) {
	tag := "P"
	if whole {
		tag = "F"
	}
	b := fmt.Appendf(nil, "%s %s %s %s\n", time.Now().Format(time.RFC3339Nano), stream, tag, text)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.f.Write(b)
}

// copyLines logs r a line at a time.
func (l *logFile) copyLines(stream string, r io.Reader) {
	b := bufio.NewReaderSize(r, 16<<10)
	for {
		text, err := b.ReadSlice('\n')
		switch {
		case err == nil:
			l.line(stream, true, text[:len(text)-1])
		case errors.Is(err, bufio.ErrBufferFull):
			l.line(stream, false, text)
		default:
			if len(text) > 0 {
				l.line(stream, false, text)
			}
			return
		}
	}
}

// copyChunks logs r as it comes: who sits at a terminal waits for a prompt, not for the end of its line.
func (l *logFile) copyChunks(stream string, r io.Reader) {
	buf := make([]byte, 16<<10)
	for {
		n, err := r.Read(buf)
		for text := buf[:n]; len(text) > 0; {
			end := bytes.IndexByte(text, '\n')
			if end < 0 {
				l.line(stream, false, text)
				break
			}
			l.line(stream, true, text[:end])
			text = text[end+1:]
		}
		if err != nil { // EIO once nobody has the other end
			return
		}
	}
}
